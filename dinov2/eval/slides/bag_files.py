"""Writes the bag of a slide as CLAM and TRIDENT do; :mod:`dinov2.eval.slides.bags` reads it."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dinov2.errors import ConfigError
from dinov2.eval.slides.bags import HDF5_FOLDER, TORCH_FOLDER

HDF5, TORCH, BOTH = "h5", "pt", "both"
FORMATS = (HDF5, TORCH, BOTH)
RECIPE = "recipe"
PAGES = "qc"


def check_format(format_name: str) -> None:
    """Refuse a format that can not be written, before any slide is opened.

    Raises:
        ConfigError: there is no such format, or h5py is missing.
    """
    if format_name not in FORMATS:
        raise ConfigError(f'the format of bags is "{format_name}"; accepted are {", ".join(FORMATS)}')
    if format_name != TORCH:
        try:
            import h5py  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                "writing HDF5 bags needs the package h5py: pip install -e '.[slides]', or give --format pt"
            ) from error


def bag_names(name: str, format_name: str) -> list[str]:
    """Return the files of a slide's bag below the output folder."""
    names = {HDF5: f"{HDF5_FOLDER}/{name}.h5", TORCH: f"{TORCH_FOLDER}/{name}.pt"}
    return list(names.values()) if format_name == BOTH else [names[format_name]]


def page_name(name: str) -> str:
    """Return the file of a slide's page below the output folder."""
    return f"{PAGES}/{name}.png"


def write_bag(
    folder: Path,
    name: str,
    format_name: str,
    features: np.ndarray,
    coords: np.ndarray,
    *,
    attributes: Mapping[str, Any],
    encoder: str,
    recipe: Mapping[str, Any],
) -> None:
    """Write a bag into a folder, safely on the disk when this returns.

    Args:
        folder: of :func:`bag_names`.
        name: of the slide.
        format_name: one of ``FORMATS``.
        features: (N, D) float32 or float16.
        coords: (N, 2) level-0 x and y of the upper left corners.
        attributes: of the coordinates.
        encoder: a name for what made the features.
        recipe: all that decided the content, as plain values; kept as JSON.
    """
    for relative in bag_names(name, format_name):
        path = folder / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.parent.name == HDF5_FOLDER:
            _write_hdf5(path, features, coords, attributes, {"encoder": encoder, "name": name}, recipe)
        else:
            torch.save(torch.from_numpy(features), path)
        to_disk(path)


def _write_hdf5(
    path: Path,
    features: np.ndarray,
    coords: np.ndarray,
    attributes: Mapping[str, Any],
    of_features: Mapping[str, Any],
    recipe: Mapping[str, Any],
) -> None:
    import h5py

    with h5py.File(path, "w") as file:
        file.attrs[RECIPE] = json.dumps(recipe, sort_keys=True)
        for key, value in of_features.items():
            file.attrs[key] = value
        values = file.create_dataset("features", data=features)
        values.attrs.update({**of_features, "savetodir": attributes["savetodir"]})
        corners = file.create_dataset("coords", data=coords.astype(np.int64))
        corners.attrs.update(attributes)


def to_disk(path: Path) -> None:
    """Wait until the content of a file is on the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
