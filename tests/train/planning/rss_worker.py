"""Prints how much memory of this process real training steps took at most, and how much was calculated.

    python -m tests.train.planning.rss_worker FORMAT key=value ...

To be run with MALLOC_MMAP_THRESHOLD_=65536, with which memory that is freed goes back to the system at once.
Linux only. A tiny run before counts what libraries take, which no formula can know.
"""

import ctypes
import gc
import json
import sys
from pathlib import Path

import torch

from tests.train.planning.steps import SMALL, calculated, resolve, run_steps


def status(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def main(number_format: str, *overrides: str) -> None:
    torch.set_num_threads(1)
    run_steps(resolve(*SMALL, "student.embed_dim=32", "student.num_heads=2", number_format=number_format), 2)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = status("VmRSS")
    cfg = resolve(*overrides, number_format=number_format)
    run_steps(cfg, 2)
    measured = status("VmHWM") - before
    memory = calculated(cfg, number_format)
    report = {"measured": measured, "calculated": memory.allocated, "moment": memory.peak_moment}
    sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
