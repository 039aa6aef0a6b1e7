"""Where CUDA itself says that the host waits for the device."""

import warnings
from pathlib import Path

import torch


def reported_waits(function) -> list[str]:
    """Call a function and return file and line of every wait in it."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            function()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    lines = [warning for warning in caught if "synchronizing CUDA operation" in str(warning.message)]
    return [f"{Path(line.filename).name}:{line.lineno}" for line in lines]
