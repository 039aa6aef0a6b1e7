"""Position embeddings for another grid of patches."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2.errors import ConfigError


def resample_positions(
    positions: Tensor, grid: tuple[int, int], *, offset: float = 0.1, antialias: bool = False
) -> Tensor:
    """Resample position embeddings bicubically; the cls token keeps its own.

    Args:
        positions: ``[1, 1 + M * M, D]``, the cls token's first.
        grid: rows and columns of patches wanted.
        offset: 0 resamples to the exact size. Any other value (released models without registers: 0.1)
            samples by the scale factor of a grid enlarged by so many patches. The two give different values,
            because the sampling points follow the given scale, and weights expect the way they were trained.
        antialias: smooth where the grid shrinks.

    Returns:
        ``[1, 1 + rows * columns, D]`` in float32.

    Raises:
        ConfigError: the stored grid is not square, or ``offset`` leads to another grid than the one wanted.
    """
    count = positions.shape[1] - 1
    side = math.isqrt(count)
    if side * side != count:
        raise ConfigError(
            f"position embeddings of {count} patches are not a square grid and cannot be resampled to "
            f"{grid[0]} x {grid[1]} patches; build the model with a square img_size"
        )
    scale = tuple((cells + offset) / side for cells in grid)
    target = {"scale_factor": scale} if offset else {"size": grid}
    cls_position, patches = positions.float().split([1, count], dim=1)
    patches = patches.transpose(1, 2).unflatten(2, (side, side))  # [1, D, M, M]
    patches = F.interpolate(patches, mode="bicubic", antialias=antialias, **target)
    if patches.shape[-2:] != grid:
        raise ConfigError(
            f"interpolate_offset {offset:g} leads from a grid of {side} x {side} patches to "
            f"{tuple(patches.shape[-2:])} instead of {grid}; use 0.1 or 0"
        )
    return torch.cat([cls_position, patches.flatten(2).transpose(1, 2)], dim=1)


def crop_positions(positions: Tensor, grid: tuple[int, int]) -> Tensor:
    """Cut the middle out of position embeddings, so that every patch keeps its neighbours' distances.

    For images of fewer patches at the same scale, as in Roth et al. (ISBI 2024), where interpolation would
    squeeze the positions of a larger image.

    Args:
        positions: ``[1, 1 + M * M, D]``, the cls token's first.
        grid: rows and columns of patches wanted, at most M each.

    Returns:
        ``[1, 1 + rows * columns, D]``; with an odd remainder the part nearer to the upper left corner.

    Raises:
        ConfigError: the stored grid is not square or too small.
    """
    count = positions.shape[1] - 1
    side = math.isqrt(count)
    if side * side != count or max(grid) > side:
        raise ConfigError(
            f"position embeddings of {count} patches have no middle part of {grid[0]} x {grid[1]} patches; "
            "use student.pos_embed_resampling=interpolate or smaller crops"
        )
    cls_position, patches = positions.split([1, count], dim=1)
    top, left = ((side - cells) // 2 for cells in grid)
    patches = patches.unflatten(1, (side, side))[:, top : top + grid[0], left : left + grid[1]]
    return torch.cat([cls_position, patches.flatten(1, 2)], dim=1)
