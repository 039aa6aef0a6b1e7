"""The device a process computes on."""

import torch

from dinov2 import distributed
from dinov2.errors import ConfigError, nearest
from dinov2.utils.allocator import keep_freed_memory

ACCEPTED = ("auto", "cpu", "cuda")


def resolve_device(name: str = "auto") -> torch.device:
    """Return the device of this process: ``cuda:<local rank>`` or ``cpu``.

    A process that computes on the CPU keeps the memory that its tensors free, see
    :func:`dinov2.utils.allocator.keep_freed_memory`.

    Args:
        name: ``auto`` (CUDA when there is any), ``cpu`` or ``cuda``.

    Raises:
        ConfigError: ``name`` is unknown, or CUDA was asked for and this process cannot have a device.
    """
    if name not in ACCEPTED:
        raise ConfigError(
            f'the device "{name}" is not known{nearest(name, ACCEPTED)}: use one of {", ".join(ACCEPTED)}'
        )
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        keep_freed_memory()
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(
            'the device "cuda" was asked for, but PyTorch sees no CUDA device: use "auto" or "cpu", or check '
            "the driver and CUDA_VISIBLE_DEVICES"
        )
    return distributed.local_cuda_device()
