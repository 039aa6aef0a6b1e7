"""Shared fixtures: the recorded reference tensors, the real images and the real ViT-S/14 weights."""

import json
import logging
import os
from pathlib import Path

# Two test processes share two cores; OpenMP threads that spin slow each other down several-fold.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from safetensors.torch import load_file

from dinov2.logging import ConsoleHandler

pytest_plugins = ["tests.fixtures_weights"]

REPO = Path(__file__).resolve().parents[1]
GOLDEN = REPO / "tests" / "golden"
REAL_DATA = REPO / "scripts" / "data"

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def load_golden_json(name: str):
    return json.loads((GOLDEN / name).read_text())


def load_golden_tensors(name: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / name)


@pytest.fixture(autouse=True)
def no_logs_of_earlier_runs():
    """A run started in this process leaves its logs open, for the next tests to meet."""
    _close_logs()
    yield
    _close_logs()


def _close_logs() -> None:
    root = logging.getLogger()
    for handler in list(root.handlers):
        if type(handler) in (ConsoleHandler, logging.FileHandler):
            root.removeHandler(handler)
            handler.close()
    root.setLevel(logging.WARNING)
    logging.captureWarnings(False)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
