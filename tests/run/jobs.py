"""A module with a `main`, as small as a job can be; the processes of the submitted jobs import it."""

import argparse
import json
import os
import time
from pathlib import Path

import torch

from dinov2 import distributed
from dinov2.run.submit import Task


def main(args: argparse.Namespace) -> dict:
    """Add up the ranks over all processes, and leave a note of the arguments."""
    distributed.enable(device="cpu")
    rank = distributed.get_global_rank()
    total = distributed.all_reduce_sum_(torch.tensor(float(rank + 1))).item()
    folder = Path(args.output_dir)
    folder.mkdir(exist_ok=True)
    note = {"rank": rank, "total": total, "opts": args.opts, "directory": str(Path.cwd())}
    (folder / f"note_{rank}.json").write_text(json.dumps(note))
    marker = folder / "interrupt_me"
    if args.opts == ["wait"] and not marker.exists():
        marker.write_text(str(os.getpid()))
        time.sleep(60)
    return note


class SumOfRanks(Task):
    module = "tests.run.jobs"
