"""Whether freed memory is used again, by the pages that the system had to hand out anew."""

import platform
import subprocess
import sys

import pytest

from dinov2.utils.allocator import VARIABLES

ROUNDS, BYTES = 8, 2**26  # and as many rounds before, in which small blocks find their places
PROGRAM = f"""
import resource, sys
import torch
from dinov2.utils.device import resolve_device

if sys.argv[1] == "resolve":
    resolve_device("cpu")

def faults(rounds):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        torch.ones({BYTES} // 4)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults({ROUNDS})
print(faults({ROUNDS}) * resource.getpagesize() / ({ROUNDS} * {BYTES}))
"""

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")


def share_handed_out(monkeypatch, what, **environment):
    for name in (*VARIABLES, "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    out = subprocess.run([sys.executable, "-c", PROGRAM, what], check=True, capture_output=True, text=True)
    return float(out.stdout)


def test_memory_is_handed_out_anew_by_default(monkeypatch):
    assert share_handed_out(monkeypatch, "nothing") > 0.9


def test_a_process_on_the_cpu_uses_its_memory_again(monkeypatch):
    assert share_handed_out(monkeypatch, "resolve") < 0.1


def test_settings_of_the_environment_win(monkeypatch):
    assert share_handed_out(monkeypatch, "resolve", MALLOC_MMAP_MAX_="65536") > 0.9
