"""Corners of tiles in HDF5 files of the CLAM and TRIDENT layouts."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from dinov2.data.slides.reader import Slide
from dinov2.data.slides.sources import SlideSource
from dinov2.errors import ConfigError, DatasetError

_TRIDENT_ENDING = "_patches"
# How far the tiles of a file may differ in side from what is asked for; scanners differ by about as much.
SIDE_TOLERANCE = 0.05


def with_coordinate_files(sources: Sequence[SlideSource], folder: str) -> list[SlideSource]:
    """Give each slide its file ``<slide>_patches.h5`` (TRIDENT) or ``<slide>.h5`` (CLAM) below a folder.

    Files in a folder ``patches`` are preferred: both layouts keep features under the same names elsewhere. A
    slide without a file gets the path where it was expected, so that opening it names what is missing.

    Raises:
        DatasetError: the folder has no such files, several that fit one slide equally, or one for two slides.
    """
    by_stem: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(Path(folder).rglob("*.h5")):
        by_stem[path.stem.removesuffix(_TRIDENT_ENDING)].append(path)
    if not by_stem:
        raise DatasetError(f'there is no .h5 file of coordinates below "{folder}": correct coords')
    seen: dict[str, str] = {}
    for source in sources:
        other = seen.setdefault(Path(source.path).stem, source.path)
        if other != source.path:
            raise DatasetError(
                f'"{other}" and "{source.path}" would both take the coordinates of "{Path(other).stem}": '
                "draw them in two datasets"
            )
    return [replace(source, coords=_best(Path(source.path).stem, by_stem, folder)) for source in sources]


def _best(stem: str, by_stem: dict[str, list[Path]], folder: str) -> str:
    for fits in _PREFERENCES:
        files = [path for path in by_stem.get(stem, ()) if fits(path)]
        if len(files) > 1:
            raise DatasetError(
                f'the slide "{stem}" has several files of coordinates, "{files[0]}" and "{files[1]}": give '
                "coords the folder of one of them"
            )
        if files:
            return str(files[0])
    return str(Path(folder, f"{stem}.h5"))


_PREFERENCES: tuple[Callable[[Path], bool], ...] = (
    lambda path: path.stem.endswith(_TRIDENT_ENDING),
    lambda path: path.parent.name == "patches",
    lambda path: True,
)


def read_corners(path: str, slide: Slide, *, size: int, mpp: float) -> tuple[np.ndarray, float]:
    """Return the corners of a file, (n, 2) level-0 x and y, and the side of its tiles in level-0 pixels.

    Args:
        path: HDF5 file with a dataset ``coords``. Its attributes give the side: ``patch_size_level0``
            (TRIDENT), or ``patch_size`` in pixels of the level ``patch_level`` (CLAM).
        slide: the slide it belongs to.
        size, mpp: the tiles that are asked for; those of the file must have about their side.

    Raises:
        ConfigError: h5py is missing.
        DatasetError: the file is missing, of another kind, or its tiles are of another size.
    """
    try:
        import h5py
    except ImportError as error:
        raise ConfigError("files of coordinates need h5py: pip install -e '.[slides]'") from error
    try:
        with h5py.File(path, "r") as file:
            corners = np.asarray(file["coords"][:])
            attributes = dict(file["coords"].attrs)
    except (OSError, KeyError) as error:
        raise DatasetError(f'"{path}" is missing or has no dataset coords ({error})') from error
    if corners.ndim != 2 or corners.shape[1] != 2:
        raise DatasetError(f'coords of "{path}" has the shape {list(corners.shape)}; it takes [n, 2]')
    side = _side(attributes, slide, path)
    wanted = size * slide.downsample(mpp)
    if abs(side / wanted - 1) > SIDE_TOLERANCE:
        raise DatasetError(
            f'the tiles of "{path}" have {side:g} level-0 pixels a side, but {size} pixels at {mpp:g} um '
            f"take {wanted:g} of them: ask for size={size} at mpp={side / size * slide.mpp:.3g}"
        )
    return corners.astype(np.int64), side


def _side(attributes: dict, slide: Slide, path: str) -> float:
    if "patch_size_level0" in attributes:
        return float(attributes["patch_size_level0"])
    if "patch_size" in attributes and "patch_level" in attributes:
        level = int(attributes["patch_level"])
        if 0 <= level < len(slide.level_downsamples):
            return float(attributes["patch_size"]) * slide.level_downsamples[level]
    raise DatasetError(
        f'coords of "{path}" does not say how large its tiles are: it needs the attribute patch_size_level0, '
        f"or patch_size and a patch_level below {len(slide.level_downsamples)}"
    )
