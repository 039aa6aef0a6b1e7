"""Randomness and arithmetic of the loader's worker processes."""

import torch

from dinov2 import distributed
from dinov2.utils.seeding import derive_seed, seed_everything


def worker_generator(seed: int, advance: int = 0) -> torch.Generator:
    """Return the generator from which a loader draws the seeds of its workers, one set per iteration over it.

    Args:
        seed: of the run.
        advance: samples that this process has drawn already, so that a resumed run does not augment as its
            beginning did.
    """
    return torch.Generator().manual_seed(derive_seed(seed, distributed.get_global_rank(), advance))


def seed_worker(worker_id: int) -> None:
    """Prepare a worker: seed Python, numpy and torch from what the loader gave it, and flush denormals.

    The seed that PyTorch gives a worker is the loader's draw plus ``worker_id``; mixing the two makes
    neighbouring workers unrelated. Narrow blur kernels hold denormal floats, which slow some blurs tenfold
    while contributing nothing to 8-bit pixels.
    """
    seed_everything(torch.initial_seed() - worker_id, worker_id)
    torch.set_flush_denormal(True)
