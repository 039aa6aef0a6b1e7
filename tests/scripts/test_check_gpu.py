"""The script that checks a GPU, with an interpreter that only writes down what it is asked."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dinov2.configs import resolve_config

SCRIPT = Path(__file__).parents[2] / "scripts" / "check_gpu.sh"


@pytest.mark.parametrize("status", [0, 1])
def test_it_measures_whatever_the_tests_say_and_reports_them(tmp_path, status):
    asked = tmp_path / "asked"
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\necho "$@" >> {asked}\ncase "$2" in pytest) exit {status};; esac\necho a table\n'
    )
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python)}
    done = subprocess.run([SCRIPT, tmp_path / "speeds"], env=environment, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert ("tests failed" in done.stdout) == bool(status)
    benches = [line.split() for line in asked.read_text().splitlines() if "bench_train.py" in line]
    assert len(benches) == 4
    for words in benches:
        cfg = resolve_config("", [word for word in words[1:] if "=" in word])
        assert cfg.student.arch in ("vit_small", "vit_large")
        table = Path(words[words.index("--output") + 1]).with_suffix(".txt")
        assert table.read_text() == "a table\n"


def test_without_a_gpu_it_says_so():
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "PyTorch finds no CUDA device here" in done.stderr
