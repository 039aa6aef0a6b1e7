"""Small public helpers of DINOv2 at their historic import path."""

import random
import subprocess
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dinov2.utils.schedule import CosineScheduler

__all__ = ["CosineScheduler", "fix_random_seeds", "get_sha", "has_batchnorms", "load_pretrained_weights"]

NOT_AVAILABLE = "N/A"


def load_pretrained_weights(model: nn.Module, pretrained_weights: str, checkpoint_key: str | None) -> None:
    """Load a backbone from a file or URL into ``model``; see :func:`dinov2.models.pretrained.load_backbone`.

    Args:
        pretrained_weights: Path or URL.
        checkpoint_key: Entry of the file to read (``teacher``), where the file has entries.

    Raises:
        WeightsError: The file cannot be read or does not fit the model.
    """
    # Imported here because `utils` lies below `models`.
    from dinov2.models.pretrained import load_backbone

    load_backbone(model, pretrained_weights, entry=checkpoint_key)


def fix_random_seeds(seed: int = 31) -> None:
    """Seed PyTorch (CPU and every CUDA device), NumPy and :mod:`random`."""
    for plant in (random.seed, np.random.seed, torch.manual_seed, torch.cuda.manual_seed_all):
        plant(seed)


def get_sha() -> str:
    """Describe the version of this code as ``sha: .., status: .., branch: ..``, N/A where git cannot tell."""
    sha = _git("rev-parse", "HEAD")
    branch = _git("rev-parse", "--abbrev-ref", "HEAD")
    changes = _git("status", "--porcelain", "--untracked-files=no")
    status = {None: NOT_AVAILABLE, "": "clean"}.get(changes, "has uncommitted changes")
    return f"sha: {sha or NOT_AVAILABLE}, status: {status}, branch: {branch or NOT_AVAILABLE}"


def _git(*arguments: str) -> str | None:
    """Return git's answer about the folder of this file, None when there is no git or no repository."""
    try:
        result = subprocess.run(
            ["git", "-C", str(Path(__file__).resolve().parent), *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def has_batchnorms(model: nn.Module) -> bool:
    """Return whether any layer normalises over the batch (in one dimension or more, synchronised or not)."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
