"""Bags: the features of the tiles of one slide, in the files that CLAM, TRIDENT and this project write."""

import json
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinov2.data.datasets.folders import folders_below, without_repeats
from dinov2.errors import ConfigError, DatasetError

HDF5_SUFFIXES = (".h5", ".hdf5")
TORCH_SUFFIX = ".pt"
FEATURES = ("features", "feats")
COORDS = "coords"
# Folders of files that carry the names of slides and hold corners of tiles alone.
COORDINATE_FOLDERS = ("patches",)
# Where the two formats of one extraction lie, side by side.
HDF5_FOLDER, TORCH_FOLDER = "h5_files", "pt_files"
_BLOCK = 65_536  # rows that are looked at in one go
_HDF5_ERRORS = (OSError, KeyError, TypeError, ValueError, AttributeError, RuntimeError)
_TORCH_ERRORS = (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile)


@dataclass(frozen=True)
class Bag:
    """The tiles of one slide.

    Attributes:
        name: of the slide.
        features: (N, D), a row per tile, of the type in the file unless another was asked for; N >= 1.
        coords: (N, 2) int64, level-0 x and y of the upper left corners; None where the file has none.
        attributes: what the file says of itself, such as ``patch_size_level0`` and ``mpp``; plain values.
    """

    name: str
    features: Tensor
    coords: Tensor | None = None
    attributes: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.features)


@dataclass(frozen=True)
class BagFacts:
    """What is known of a bag before its features are read: N tiles of D numbers, and :func:`encoder_of`."""

    tiles: int
    width: int
    encoder: str = ""


def encoder_of(attributes: Mapping[str, Any]) -> str:
    """Return what made the features of a bag, by its attributes; empty where they do not say.

    It is the name of the encoder. Where the recipe of our extraction is there, the tokens that were pooled
    follow, which change features and not their width.
    """
    name = str(attributes.get("encoder") or "")
    try:
        pool = json.loads(attributes["recipe"])["encoder"]["pool"]
    except (KeyError, TypeError, ValueError):  # the bag of another program
        return name
    return f"{name} ({pool})" if name else ""


def look_at_bag(path: Path) -> BagFacts:
    """Return the facts of a bag, without reading its features where that is possible.

    Raises:
        ConfigError: h5py is missing.
        DatasetError: see :func:`read_bag`.
    """
    hdf5 = path.suffix.lower() in HDF5_SUFFIXES
    try:
        shape, encoder = _hdf5_facts(path) if hdf5 else (_torch_shape(path), "")
    except (*_HDF5_ERRORS, *_TORCH_ERRORS):
        shape, encoder = (), ""
    if len(shape) == 3 and shape[0] == 1:
        shape = shape[1:]
    if len(shape) != 2 or not all(shape):
        # Files of another kind are read as a whole; what is none is told in a sentence.
        shape = tuple(read_bag(path).features.shape)
    return BagFacts(*shape, encoder)


def _hdf5_facts(path: Path) -> tuple[tuple[int, ...], str]:
    with _h5py().File(path, "r") as file:
        name = next((name for name in FEATURES if name in file), None)
        if name is None:
            return (), ""
        return tuple(file[name].shape), encoder_of(_plain(file.attrs) | _plain(file[name].attrs))


def _torch_shape(path: Path) -> tuple[int, ...]:
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if isinstance(content, Mapping):
        content = next((content[name] for name in FEATURES if name in content), None)
    return tuple(content.shape) if isinstance(content, Tensor) else ()


def read_bag(path: str | Path, *, dtype: torch.dtype | None = None) -> Bag:
    """Read the bag of a slide.

    HDF5 files hold ``features`` (or ``feats``), (N, D) or (1, N, D), and may hold ``coords``, (N, 2) or
    (1, N, 2), each with attributes. ``.pt`` files hold a tensor of features, or a dict with these names.

    Args:
        path: of the file; its name without the suffix is the slide's.
        dtype: of the features; None leaves them as they are.

    Raises:
        ConfigError: h5py is missing.
        DatasetError: the file is missing, is no bag, holds no tile or features that are not finite, or its
            features and coordinates differ in number.
    """
    path = Path(path)
    if not path.is_file():
        raise DatasetError(f'there is no bag "{path}": correct the path, or extract the slide')
    if path.suffix.lower() in HDF5_SUFFIXES:
        features, coords, attributes = _read_hdf5(path)
    elif path.suffix.lower() == TORCH_SUFFIX:
        features, coords, attributes = _read_torch(path)
    else:
        raise DatasetError(
            f'"{path}" is not a bag: its name has to end with {", ".join([*HDF5_SUFFIXES, TORCH_SUFFIX])}'
        )
    features = _checked_features(features, path)
    if coords is not None:
        coords = _checked_coords(coords, len(features), path)
    return Bag(path.stem, features if dtype is None else features.to(dtype), coords, attributes)


def find_bags(folder: str | Path) -> dict[str, Path]:
    """Return the bags in a folder and below it by the names of their slides, in the order of the names.

    Where an extraction left both formats, ``h5_files/NAME.h5`` and ``pt_files/NAME.pt`` side by side, the
    former is taken, which knows the coordinates. Folders named ``patches`` hold coordinates and are passed
    over.

    Raises:
        DatasetError: there is no bag, or a slide has several.
    """
    suffixes = (*HDF5_SUFFIXES, TORCH_SUFFIX)
    found = [
        str(Path(parent, name))
        for parent, names in folders_below(str(folder))
        if Path(parent).name not in COORDINATE_FOLDERS
        for name in names
        if Path(name).suffix.lower() in suffixes
    ]
    bags: dict[str, Path] = {}
    for path in map(Path, without_repeats(str(folder), found)):
        other = bags.setdefault(path.stem, path)
        if other == path or _twin(path) == other:
            continue
        if _twin(other) != path:
            raise DatasetError(
                f'the slide "{path.stem}" has two bags, "{other}" and "{path}": give the folder of one '
                "extraction, or remove one of them"
            )
        bags[path.stem] = path
    if not bags:
        raise DatasetError(
            f'there is no bag in "{folder}" ({", ".join(suffixes)}): correct the folder, or make bags with '
            "python -m dinov2.eval.slides.extract"
        )
    return dict(sorted(bags.items()))


def _twin(path: Path) -> Path | None:
    """Return the HDF5 file that the same extraction wrote beside a ``.pt`` file; None for other files."""
    if path.suffix != TORCH_SUFFIX or path.parent.name != TORCH_FOLDER:
        return None
    return path.parent.parent / HDF5_FOLDER / f"{path.stem}{HDF5_SUFFIXES[0]}"


def _h5py() -> ModuleType:
    try:
        import h5py
    except ImportError as error:
        raise ConfigError("reading HDF5 bags needs the package h5py: pip install -e '.[slides]'") from error
    return h5py


def _read_hdf5(path: Path) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
    h5py = _h5py()
    try:
        with h5py.File(path, "r") as file:
            name = next((name for name in FEATURES if name in file), None)
            if name is None:
                raise DatasetError(
                    f'"{path}" has no dataset features, only {", ".join(file) or "nothing"}: give files of '
                    "features, not of coordinates"
                )
            attributes = _plain(file.attrs) | _plain(file[name].attrs)
            features, coords = torch.from_numpy(file[name][()]), None
            if COORDS in file:
                coords = torch.from_numpy(file[COORDS][()].astype(np.int64))
                # Those of the coordinates are the ones that other programs document.
                attributes |= _plain(file[COORDS].attrs)
    except _HDF5_ERRORS as error:
        if isinstance(error, DatasetError):
            raise
        raise DatasetError(f'the bag "{path}" cannot be read ({error}): extract the slide again') from error
    return features, coords, attributes


def _plain(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return HDF5 attributes as numbers, texts and lists."""
    values = {}
    for key, value in attributes.items():
        if isinstance(value, bytes):
            value = value.decode("utf-8", "replace")
        values[key] = value.tolist() if isinstance(value, np.ndarray | np.generic) else value
    return values


def _read_torch(path: Path) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except _TORCH_ERRORS as error:
        reason = str(error).split("\n")[0]
        raise DatasetError(f'the bag "{path}" cannot be read ({reason}): extract the slide again') from error
    coords = None
    if isinstance(content, Mapping):
        coords = content.get(COORDS)
        name = next((name for name in FEATURES if name in content), "")
        content = content.get(name)
    if not isinstance(content, Tensor) or not isinstance(coords, Tensor | None):
        raise DatasetError(
            f'"{path}" does not hold a tensor (N, D), or a dict of the tensors features and coords: '
            "extract the slide again"
        )
    return content, None if coords is None else coords.long(), {}


def _checked_features(features: Tensor, path: Path) -> Tensor:
    shape = list(features.shape)
    if features.ndim == 3 and len(features) == 1:
        features = features[0]
    if features.ndim != 2 or not features.is_floating_point():
        raise DatasetError(
            f'the features of "{path}" are {str(features.dtype).removeprefix("torch.")} of the shape {shape}'
            "; a bag has floating-point numbers of the shape [tiles, width]"
        )
    if not features.numel():
        raise DatasetError(
            f'the bag "{path}" holds no tile (features of the shape {shape}): leave the slide out, or '
            "extract it with a lower --min-tissue"
        )
    for start in range(0, len(features), _BLOCK):
        finite = features[start : start + _BLOCK].isfinite().all(dim=1)
        if not finite.all():
            first = start + int(finite.int().argmin())
            raise DatasetError(
                f'the features of tile {first} in "{path}" are not finite (NaN or infinite): extract the '
                "slide again"
            )
    return features


def _checked_coords(coords: Tensor, tiles: int, path: Path) -> Tensor:
    shape = list(coords.shape)
    if coords.ndim == 3 and len(coords) == 1:
        coords = coords[0]
    if coords.ndim != 2 or coords.shape[1] != 2:
        raise DatasetError(f'the coordinates in "{path}" have the shape {shape}; a bag has [tiles, 2]')
    if len(coords) != tiles:
        raise DatasetError(
            f'"{path}" has features of {tiles} tiles but coordinates of {len(coords)}: extract the slide '
            "again"
        )
    return coords
