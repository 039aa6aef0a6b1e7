"""Randomness and arithmetic inside the loader's workers."""

import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from dinov2 import distributed
from dinov2.data import SamplerType, make_data_loader
from dinov2.data.workers import seed_worker, worker_generator
from tests.conftest import REPO


class Denormals(torch.utils.data.Dataset):
    """Its items are sums of numbers too small for the normal range of float32."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return (torch.full((64,), 1e-39) * torch.ones(64)).sum().item()


def test_workers_flush_denormals():
    if not torch.set_flush_denormal(False):
        pytest.skip("this processor can not flush denormals")
    sums = {}
    for num_workers in (0, 1):
        loader = make_data_loader(
            dataset=Denormals(), batch_size=4, num_workers=num_workers, sampler_type=SamplerType.EPOCH
        )
        sums[num_workers] = next(iter(loader)).abs().sum().item()
    assert sums[0] > 0
    assert sums[1] == 0


SHARED_IMPORTS = """
import sys
from torch.utils.data import DataLoader, Dataset
from dinov2.data.workers import worker_options

class Memory(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        with open("/proc/self/smaps_rollup") as file:
            return sum(int(line.split()[1]) for line in file if line.startswith("Private_"))

if __name__ == "__main__":
    options = worker_options(1, timeout=0, prefetch_factor=None, start_method="forkserver")
    print(int(next(iter(DataLoader(Memory(), **options)))))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_workers_of_a_fork_server_share_what_they_import(tmp_path):
    """torch alone has 280 MiB that a process of its own can not share."""
    script = tmp_path / "memory.py"
    script.write_text(SHARED_IMPORTS)
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=REPO, check=True)
    assert int(run.stdout) / 1024 < 100


def test_generator_depends_on_seed_rank_and_position(monkeypatch):
    seeds = set()
    for rank in range(2):
        monkeypatch.setattr(distributed, "get_global_rank", lambda rank=rank: rank)
        seeds |= {worker_generator(seed, advance).initial_seed() for seed in (0, 1) for advance in (0, 64)}
    assert len(seeds) == 8


def test_seed_worker_seeds_every_generator():
    def draws(loader_seed, worker):
        torch.manual_seed(loader_seed + worker)  # what PyTorch does before it calls the function
        seed_worker(worker)
        return torch.rand(1).item(), random.random(), np.random.rand()

    try:
        assert draws(5, 0) == draws(5, 0)
        columns = zip(*(draws(seed, worker) for seed in (5, 6) for worker in range(3)), strict=True)
        assert all(len(set(column)) == 6 for column in columns)
    finally:
        torch.set_flush_denormal(False)
