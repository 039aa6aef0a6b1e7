"""Seeds of single samples against seeds of everything."""

import random

import numpy as np
import pytest
import torch

from dinov2.utils.seeding import seed_cpu, seed_everything


def draws():
    return random.random(), np.random.rand(3).tolist(), torch.rand(3).tolist(), torch.randn(3).tolist()


@pytest.mark.parametrize("parts", [(0,), (0, 0, 5), (7, 3, 2**40)])
def test_the_cpu_draws_alike_after_both(parts):
    seed_everything(*parts)
    wanted = draws()
    seed = seed_cpu(*parts)
    assert draws() == wanted
    assert torch.initial_seed() == seed


@pytest.mark.gpu
def test_accelerators_keep_their_seed():
    seed_everything(1)
    wanted = torch.rand(3, device="cuda")
    seed_everything(1)
    seed_cpu(2)
    assert torch.equal(torch.rand(3, device="cuda"), wanted)
