"""The memory of training and scoring over many bags is that of one bag."""

import json
import subprocess
import sys

import pytest
import torch

from tests.conftest import REPO


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_bags(tmp_path):
    for number in range(2):
        torch.save(torch.randn(10_000, 384).half(), tmp_path / f"{number}.pt")

    def peak(bags):
        command = [sys.executable, "scripts/bench_bags.py", "--measure", str(tmp_path), str(bags), "mean"]
        out = subprocess.run(command, check=True, capture_output=True, text=True, cwd=REPO).stdout
        return json.loads(out)["peak_rss_mib"]

    few, many = peak(8), peak(48)
    # 40 bags more are 293 MiB in float16, and 586 MiB in float32.
    assert many - few < 60, (few, many)
