"""The tiles of one slide: found by tissue or read from a file of coordinates, and kept on disk."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from dinov2.data.datasets.arrays import atomic_file
from dinov2.data.slides.coordinate_files import read_corners
from dinov2.data.slides.grid import check_grid, tile_grid
from dinov2.data.slides.reader import open_slide
from dinov2.data.slides.sources import SlideSource
from dinov2.errors import UserError

# Raised when the same slide and settings would give other tiles.
VERSION = 1


@dataclass(frozen=True)
class TileSpec:
    """Which tiles are cut from every slide, see :func:`~dinov2.data.slides.grid.tile_grid`.

    Raises:
        ConfigError: a value is out of its range.
    """

    size: int
    mpp: float
    overlap: int = 0
    min_tissue: float = 0.25
    backend: str = "auto"

    def __post_init__(self) -> None:
        check_grid(size=self.size, mpp=self.mpp, overlap=self.overlap, min_tissue=self.min_tissue)


@dataclass(frozen=True)
class SlideTiles:
    """Tiles of one slide.

    Attributes:
        corners: (n, 2) int32, level-0 x and y.
        side: of a tile in level-0 pixels.
        mpp: um per level-0 pixel.
    """

    corners: np.ndarray
    side: float
    mpp: float


def find_tiles(source: SlideSource, spec: TileSpec) -> SlideTiles:
    """Open a slide and find its tiles.

    Raises:
        UserError: the slide, its mask or its coordinates can not be read.
    """
    with open_slide(source.path, mpp=source.mpp, backend=spec.backend) as slide:
        if source.coords:
            corners, side = read_corners(source.coords, slide, size=spec.size, mpp=spec.mpp)
        else:
            from dinov2.data.slides.mask_files import read_mask
            from dinov2.data.slides.tissue import segment_tissue

            side = spec.size * slide.downsample(spec.mpp)
            mask = read_mask(source.mask, slide) if source.mask else segment_tissue(slide)
            corners = tile_grid(
                slide,
                size=spec.size,
                mpp=spec.mpp,
                overlap=spec.overlap,
                mask=mask,
                min_tissue=spec.min_tissue,
            )
        return SlideTiles(corners.astype(np.int32), side, slide.mpp)


def fingerprint(source: SlideSource, spec: TileSpec) -> str:
    """Return a name for the tiles of a slide that changes with its files and with the settings."""
    files = [path for path in (source.path, source.mask, source.coords) if path]
    facts = [VERSION, asdict(spec), source.mpp, *(_stamp(path) for path in files)]
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=12).hexdigest()


def _stamp(path: str) -> list:
    try:
        status = os.stat(path)  # noqa: PTH116 - called for every slide
    except OSError:
        return [path]
    return [str(Path(path).absolute()), status.st_size, status.st_mtime_ns]


def store_tiles(source: SlideSource, spec: TileSpec, path: str) -> str:
    """Find the tiles of a slide and write them to a file; return what was wrong, empty if nothing."""
    try:
        tiles = find_tiles(source, spec)
    except UserError as error:
        return str(error)
    # What a damaged slide makes of the libraries below is not known; it must not cost the other slides.
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    with atomic_file(path) as file:
        np.savez(file, corners=tiles.corners, side=tiles.side, mpp=tiles.mpp)
    return ""


def load_tiles(path: str) -> SlideTiles:
    """Read what :func:`store_tiles` wrote."""
    with np.load(path, allow_pickle=False) as stored:
        return SlideTiles(stored["corners"], float(stored["side"]), float(stored["mpp"]))
