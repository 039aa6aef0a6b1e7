"""One seed for a run, and every other seed derived from it."""

import random

import numpy as np
import torch


def derive_seed(*parts: int) -> int:
    """Mix non-negative integers into one 63-bit seed, e.g. ``derive_seed(seed, rank, iteration)``.

    The mixing is numpy's ``SeedSequence``: different parts give unrelated seeds, and unlike a sum or a
    product no two combinations in a run coincide.
    """
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


def seed_everything(*parts: int) -> None:
    """Seed Python, numpy and torch (all devices) from ``parts``."""
    torch.manual_seed(seed_cpu(*parts))


def seed_cpu(*parts: int) -> int:
    """Seed what draws on the CPU as :func:`seed_everything` does, and leave accelerators alone.

    Fit for every sample: ``torch.manual_seed`` notes the call stack for devices that are not in use yet,
    which takes ten times as long as all else here.

    Returns:
        The seed that torch's generator got.
    """
    seed = derive_seed(*parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    return seed
