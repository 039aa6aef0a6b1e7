"""Where the tiles of a slide lie, in files for people and for other programs.

``coordinates/<slide>.csv`` is written for every slide. With coordinates only there are also HDF5 files whose
names and attributes are those of CLAM and of TRIDENT, so that their feature extraction reads them.
"""

import csv
from pathlib import Path
from typing import Any

import numpy as np

from dinov2.data.slides.plan import TilePlan
from dinov2.data.slides.reader import Slide
from dinov2.data.slides.recipe import TilingRecipe
from dinov2.errors import ConfigError

COLUMNS = ("n", "x", "y", "tissue", "edge")
POWERS = (80, 60, 40, 20, 10, 5, 2.5, 1.25)
_MPP_TIMES_POWER = 10.0
# Scanners call 0.23 um "40x" and 0.46 um "20x".
_SCANNER_TOLERANCE = 0.15


def write_csv(path: Path, plan: TilePlan) -> None:
    """Write number, level-0 corner, share of tissue and whether it is padded, one tile a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="ascii", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        columns = plan.numbers.tolist(), *plan.corners.T.tolist(), plan.tissue.tolist(), plan.edge.tolist()
        writer.writerows(
            (n, x, y, f"{tissue:.4f}", int(edge)) for n, x, y, tissue, edge in zip(*columns, strict=True)
        )


def hdf5_names(name: str, recipe: TilingRecipe) -> dict[str, str]:
    """Return the paths of the two files below the output folder: ``clam`` and ``trident``."""
    folder = f"{magnification(recipe.mpp):g}x_{recipe.size}px_{recipe.overlap}px_overlap"
    return {"clam": f"patches/{name}.h5", "trident": f"{folder}/patches/{name}_patches.h5"}


def write_hdf5(root: Path, name: str, slide: Slide, plan: TilePlan, recipe: TilingRecipe) -> None:
    """Write the coordinates as CLAM and as TRIDENT do, each with its attributes and ours about resolution.

    CLAM reads ``patch_size`` pixels of ``patch_level`` and leaves resizing to its transform; TRIDENT reads
    ``patch_size_level0`` and resizes to ``patch_size``. Both take ``coords`` in level-0 pixels.

    Args:
        root: folder to write :func:`hdf5_names` below.

    Raises:
        ConfigError: h5py is missing.
    """
    names = hdf5_names(name, recipe)
    ours = {"mpp": recipe.mpp, "level0_mpp": slide.mpp, "mpp_source": slide.mpp_source, "edges": recipe.edges}
    _write(root / names["clam"], plan.corners, {**clam_attributes(name, slide, plan), **ours})
    _write(root / names["trident"], plan.corners, {**trident_attributes(name, slide, plan, recipe), **ours})


def clam_attributes(name: str, slide: Slide, plan: TilePlan) -> dict[str, Any]:
    """Return the attributes of CLAM's ``coords``."""
    dimensions = np.array(slide.level_dimensions[plan.level])
    downsample = slide.level_downsamples[plan.level]
    return {
        "patch_size": max(1, round(plan.side / downsample)),
        "patch_level": plan.level,
        "downsample": np.array([downsample, downsample]),
        "downsampled_level_dim": dimensions,
        "level_dim": dimensions,
        "name": name,
        "save_path": "patches",
    }


def trident_attributes(name: str, slide: Slide, plan: TilePlan, recipe: TilingRecipe) -> dict[str, Any]:
    """Return the attributes of TRIDENT's ``coords``."""
    width, height = slide.dimensions
    return {
        "patch_size": recipe.size,
        "patch_size_level0": plan.side,
        "overlap": recipe.overlap,
        "target_magnification": magnification(recipe.mpp),
        "level0_magnification": magnification(slide.mpp, tolerance=_SCANNER_TOLERANCE),
        "level0_width": width,
        "level0_height": height,
        "name": name,
        "savetodir": ".",
    }


def magnification(mpp: float, *, tolerance: float = 0.02) -> int | float:
    """Return the magnification of a resolution: a usual one if it is that close, else 10 / mpp."""
    exact = _MPP_TIMES_POWER / mpp
    usual = min(POWERS, key=lambda power: abs(exact / power - 1))
    power = usual if abs(exact / usual - 1) <= tolerance else round(exact, 2)
    return int(power) if power == int(power) else float(power)


def _write(path: Path, corners: np.ndarray, attributes: dict[str, Any]) -> None:
    try:
        import h5py
    except ImportError as error:
        raise ConfigError("writing coordinates needs the package h5py: pip install -e '.[slides]'") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        dataset = file.create_dataset(
            "coords", data=corners.astype(np.int64), maxshape=(None, 2), chunks=(max(1, len(corners)), 2)
        )
        for key, value in attributes.items():
            dataset.attrs[key] = value
