"""Memory of real steps, in this machine's RAM and on a GPU, compared with what is calculated."""

import json
import os
import subprocess
import sys

import pytest
import torch

from tests.conftest import REPO
from tests.train.planning.steps import calculated, resolve, run_steps

CASES = {
    "activations": ("train.batch_size_per_gpu=8", "dino.head_n_prototypes=8192"),
    "prototypes": ("train.batch_size_per_gpu=4",),
}


def measure(*overrides: str) -> dict:
    words = ["student.arch=vit_small", "student.patch_size=14", "crops.local_crops_size=98"]
    words += ["train.centering=sinkhorn_knopp", *overrides]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": str(REPO)}
    command = [sys.executable, "-m", "tests.train.planning.rss_worker", "fp32", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=REPO)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("case", CASES)
def test_growth_of_ram(case):
    report = measure(*CASES[case])
    assert report["calculated"] == pytest.approx(report["measured"], rel=0.15)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_growth_of_ram_with_recomputation(mode):
    report = measure(*CASES["activations"], f"train.activation_checkpointing={mode}")
    assert report["calculated"] == pytest.approx(report["measured"], rel=0.15)


@pytest.mark.gpu
@pytest.mark.parametrize("number_format", ["fp32", "bf16", "fp16"])
def test_peak_of_a_gpu(number_format):
    cfg = resolve(
        "student.arch=vit_small",
        "student.patch_size=14",
        "crops.local_crops_size=98",
        "train.centering=sinkhorn_knopp",
        "train.batch_size_per_gpu=32",
        "train.compile=false",
        number_format=number_format,
    )
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run_steps(cfg, 3, device="cuda")
    measured = torch.cuda.max_memory_allocated() - before
    assert calculated(cfg, number_format, "cuda").allocated == pytest.approx(measured, rel=0.15)
