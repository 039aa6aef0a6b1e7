"""The random generators of a process as tensors: Python's, numpy's, torch's and its CUDA device's."""

import random

import numpy as np
import torch
from torch import Tensor


def capture() -> dict[str, Tensor]:
    """Return the state of every generator; ``cuda`` is absent where CUDA has not been used."""
    version, internal, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "python": torch.tensor([version, *internal]),
        # What is left of a pair of normal numbers; not a number if nothing is.
        "python_gauss": torch.tensor([float("nan") if gauss is None else gauss], dtype=torch.float64),
        "numpy": torch.tensor([*keys.tolist(), position, has_gauss]),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore(state: dict[str, Tensor]) -> None:
    """Set every generator that :func:`capture` saw."""
    version, *internal = state["python"].tolist()
    gauss = state["python_gauss"].item()
    random.setstate((version, tuple(internal), None if gauss != gauss else gauss))
    *keys, position, has_gauss = state["numpy"].tolist()
    numbers = np.array(keys, dtype=np.uint32)
    np.random.set_state(("MT19937", numbers, position, has_gauss, state["numpy_gauss"].item()))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
