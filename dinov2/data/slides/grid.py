"""Where the tiles of a slide lie."""

import math
from typing import TYPE_CHECKING

import numpy as np

from dinov2.data.slides.reader import Slide
from dinov2.errors import ConfigError

if TYPE_CHECKING:
    from dinov2.data.slides.tissue import TissueMask

EDGES = ("drop", "pad")


def tile_grid(
    slide: Slide,
    *,
    size: int,
    mpp: float,
    overlap: int = 0,
    mask: "TissueMask | None" = None,
    min_tissue: float = 0.0,
    edges: str = "drop",
) -> np.ndarray:
    """Return the upper left corners of a slide's tiles, row by row from the top.

    The grid starts at the corner of the scanned area; its step is ``(size - overlap)`` pixels at ``mpp``.

    Args:
        slide: the slide.
        size: side of a tile in pixels at ``mpp``.
        mpp: resolution of the tiles in um per pixel.
        overlap: pixels at ``mpp`` that neighbours share, less than ``size``; negative for a gap.
        mask: keeps the tiles with at least ``min_tissue`` tissue; None keeps all.
        min_tissue: share of a tile's area, 0 to 1. 0 keeps every tile with any tissue.
        edges: ``drop`` leaves out tiles that reach beyond the scanned area, ``pad`` keeps them.

    Returns:
        (n, 2) int64, level-0 x and y.

    Raises:
        ConfigError: a value is out of its range.
        DatasetError: the slide is coarser than ``mpp``.
    """
    check_grid(size=size, mpp=mpp, overlap=overlap, min_tissue=min_tissue, edges=edges)
    factor = slide.downsample(mpp)
    left, top, width, height = slide.bounds
    columns, rows = (_starts(length, size, size - overlap, factor, edges) for length in (width, height))
    x, y = np.meshgrid(left + columns, top + rows)
    corners = np.stack([x.ravel(), y.ravel()], axis=1)
    if mask is not None:
        share = mask.tissue_share(corners[:, 0], corners[:, 1], slide.patch_size_level0(size, mpp))
        corners = corners[(share >= min_tissue) & (share > 0)]
    return corners


def check_grid(*, size: int, mpp: float, overlap: int, min_tissue: float, edges: str = "drop") -> None:
    """Check the description of a grid, see :func:`tile_grid`.

    Raises:
        ConfigError: a value is out of its range.
    """
    if size < 1:
        raise ConfigError(f"the size of the tiles is {size}; it takes at least 1 pixel")
    if not 0 < mpp < math.inf:
        raise ConfigError(f"the mpp of the tiles is {mpp}; it takes um per pixel above 0, such as 0.5")
    if not -size <= overlap < size:
        raise ConfigError(
            f"the overlap of the tiles is {overlap}; it takes pixels, less than the size {size}, and down to "
            f"{-size} for gaps"
        )
    if not 0 <= min_tissue <= 1:
        raise ConfigError(f"min_tissue is {min_tissue}; it takes the share of a tile's area, from 0 to 1")
    if edges not in EDGES:
        raise ConfigError(f'the edges of the grid are "{edges}"; accepted are {" and ".join(EDGES)}')


def _starts(length: int, size: int, step: int, factor: float, edges: str) -> np.ndarray:
    """Return where the tiles of a row start, in level-0 pixels from its beginning."""
    # A tolerance of a hundredth of a pixel: a slide of exactly n tiles holds n tiles.
    steps = (length / factor - size) / step
    count = math.floor(steps + 0.01 / step) if edges == "drop" else max(0, math.ceil(steps - 0.01 / step))
    return np.round(np.arange(max(count + 1, 0)) * (step * factor)).astype(np.int64)
