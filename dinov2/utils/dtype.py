"""Data types by name."""

import numpy as np
import torch

from dinov2.errors import ConfigError, nearest

# NumPy's names; PyTorch uses the same.
NAMES = (
    "bool",
    "uint8",
    "int8",
    "int16",
    "int32",
    "int64",
    "float16",
    "float32",
    "float64",
    "complex64",
    "complex128",
)


def as_torch_dtype(dtype: str | np.dtype | torch.dtype) -> torch.dtype:
    """Return the PyTorch type for a NumPy name such as ``float64``, a NumPy type or a PyTorch type.

    Raises:
        ConfigError: There is no such type, or PyTorch has no equal of it.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    if name not in NAMES:
        raise ConfigError(
            f'the data type "{name}" is not known{nearest(name, NAMES)}: use one of {", ".join(NAMES)}'
        )
    return getattr(torch, name)
