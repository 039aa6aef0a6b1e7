"""What all tests of submissions need: no settings of this machine's site, and jobs that find the tests."""

import argparse
import os

import pytest

from dinov2.run.submit import get_args_parser
from tests.conftest import REPO


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("DINOV2_", "SLURM_", "SUBMITIT_")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(REPO)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def task_parser():
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--config-file", default="")
    parser.add_argument("--output-dir", default="")
    parser.add_argument("--no-resume", action="store_true")
    parser.add_argument("--weights", choices=["a", "b,c", "d"])
    parser.add_argument("opts", nargs=argparse.REMAINDER)
    return parser


def parse(*words):
    return get_args_parser(parents=[task_parser()]).parse_args([str(word) for word in words])
