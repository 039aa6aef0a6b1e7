"""Images in Parquet files: the layout of Hugging Face datasets, or a plain column of encoded images.

A Parquet file can only be read by whole row groups, so one image costs the reading of its group. Write small
groups (docs/shards_and_mixtures.md has the figures); ``scripts/pack_shards.py`` does.
"""

import json
import logging
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dinov2.data.datasets.extended import ExtendedVisionDataset
from dinov2.data.datasets.process_cache import ProcessCache
from dinov2.data.datasets.shard_index import Labels, ShardIndex, for_each_shard, list_shards
from dinov2.errors import DatasetError, ImageReadError, nearest

logger = logging.getLogger("dinov2")

GROUP_DTYPE = np.dtype([("end", "<i8"), ("shard", "<u4"), ("group", "<u4")])
LARGE_GROUP_BYTES = 8 << 20
_MIB = 1 << 20
# Types of pyarrow, which is imported where it is used.
ParquetFile, ChunkedArray, Schema = Any, Any, Any


class _File(NamedTuple):
    rows: list[int]  # of every row group
    group_bytes: int  # of the image column in the largest row group
    leaf: str  # column to read, such as image.bytes
    names: list[str]  # different labels
    places: np.ndarray  # label of every row, as place in names
    classes: list[str] | None  # names of the class numbers, if the file records them


class Parquet(ExtendedVisionDataset):
    """Images in Parquet files, with or without labels; needs pyarrow (``pip install -e .[shards]``).

    Args:
        root: folder of the files, or one file.
        pattern: which files of the folder to take; ``**/*.parquet`` looks into folders below, too.
        extra: folder of the index; empty means the folder of the files.
        image: column of the images: a struct with the field ``bytes``, as Hugging Face datasets have, or
            encoded images themselves.
        label: column of the labels, empty for none; whole numbers are used as they are, names are numbered in
            the order of the alphabet.
        cache_mb: how much of the row groups read last a process keeps, MiB.
        open_files: files kept open per process; opening one anew costs several reads of images.
        transforms, transform, target_transform: as for torchvision's datasets.

    Raises:
        DatasetError: pyarrow is missing, there are no files, or one is no Parquet file or lacks a column.
        OutputError: the index can not be written.
    """

    def __init__(
        self,
        *,
        root: str,
        pattern: str = "*.parquet",
        extra: str = "",
        image: str = "image",
        label: str = "",
        cache_mb: int = 32,
        open_files: int = 64,
        transforms: Callable | None = None,
        transform: Callable | None = None,
        target_transform: Callable | None = None,
    ) -> None:
        _pyarrow_parquet()
        super().__init__(root, transforms, transform, target_transform)
        shards = list_shards(root, pattern, dataset="Parquet", example="*.parquet")
        options = {"pattern": pattern, "image": image, "label": label}
        index = ShardIndex(extra, kind="parquet", root=root, shards=shards, options=options)
        arrays, facts = index.load_or_build(partial(_build, shards, image, label))
        if facts["group_bytes"] > LARGE_GROUP_BYTES:
            logger.warning(
                '"%s" has row groups of %.0f MiB, and every image drawn at random reads one: pack it anew '
                "with scripts/pack_shards.py",
                *(root, facts["group_bytes"] / _MIB),
            )
        self.classes: list[str] | None = facts["classes"]
        self._leaves: list[str] = facts["leaves"]
        self._groups = arrays["groups"]
        self._labels = arrays.get("labels")
        self._shards = [str(path) for path in shards]
        self._files = ProcessCache(open_files)
        self._columns = ProcessCache(cache_mb * _MIB, _number_of_bytes)

    def __len__(self) -> int:
        return int(self._groups.get()["end"][-1])

    def get_image_path(self, index: int) -> str:
        """Return the file, the row, and the path recorded with the image if there is one."""
        shard, group, row = self._place(index)
        leaf = self._leaves[shard].removesuffix("bytes") + "path"
        recorded = ""
        with suppress(DatasetError, OSError):  # the file may have gone
            if leaf in _leaves(self._files.get(self._shards[shard], _open)):
                recorded = self._read((shard, group, leaf))[row].as_py()
        return f"{self._shards[shard]}:row group {group}, row {row}{f', {recorded}' if recorded else ''}"

    def get_image_data(self, index: int) -> bytes:
        """Return the encoded image of a sample.

        Raises:
            ImageReadError: the row holds no image, or the file has gone or was damaged since it was indexed.
        """
        shard, group, row = self._place(index)
        try:
            column = self._columns.get((shard, group, self._leaves[shard]), self._read)
        except DatasetError as error:
            raise ImageReadError(str(error)) from error
        data = column[row].as_py()
        if data is None:
            raise ImageReadError("the row holds no image, perhaps a path alone: store the images themselves")
        return data

    def get_target(self, index: int) -> int | None:
        """Return the class number of a sample, None without ``label``."""
        return None if self._labels is None else int(self._labels.get()[index])

    def get_targets(self) -> np.ndarray:
        """Return the class numbers of all samples, int64.

        Raises:
            DatasetError: no ``label`` was asked for.
        """
        if self._labels is None:
            raise DatasetError(f'"{self.root}" was opened without labels: add label=<column> to Parquet')
        return self._labels.get()

    def _place(self, index: int) -> tuple[int, int, int]:
        """Return file, row group and row of a sample."""
        index = range(len(self))[index]
        groups = self._groups.get()
        number = int(np.searchsorted(groups["end"], index, side="right"))
        begin = int(groups["end"][number - 1]) if number else 0
        return int(groups["shard"][number]), int(groups["group"][number]), index - begin

    def _read(self, key: tuple[int, int, str]) -> ChunkedArray:
        """Read one column of a row group."""
        shard, group, leaf = key
        file = self._files.get(self._shards[shard], _open)
        return file.read_row_group(group, columns=[leaf], use_threads=False).flatten().column(0)


def _pyarrow_parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DatasetError("Parquet needs the package pyarrow: pip install -e .[shards]") from error
    return pyarrow.parquet


def _open(path: str) -> ParquetFile:
    try:
        return _pyarrow_parquet().ParquetFile(path, pre_buffer=False)
    except (OSError, ValueError) as error:  # pyarrow's own errors are of both kinds
        raise DatasetError(
            f'"{path}" is no complete Parquet file ({error}): copy or write it again'
        ) from error


def _number_of_bytes(column: ChunkedArray) -> int:
    return column.nbytes


def _leaves(file: ParquetFile) -> list[str]:
    """Return the paths of the stored columns, in the order in which metadata counts them."""
    return [file.schema.column(number).path for number in range(len(file.schema))]


def _build(shards: list[Path], image: str, label: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read the footers, and the labels if any, of all files; return the arrays and facts of the index."""
    scanned = for_each_shard(partial(_scan, image=image, label=label), shards, threads=True)
    rows = np.array([count for file in scanned for count in file.rows], dtype=np.int64)
    groups = np.empty(len(rows), dtype=GROUP_DTYPE)
    groups["end"] = np.cumsum(rows)
    groups["shard"] = np.repeat(np.arange(len(scanned)), [len(file.rows) for file in scanned])
    groups["group"] = np.concatenate([np.arange(len(file.rows)) for file in scanned])
    groups = groups[rows > 0]
    if not len(groups):
        raise DatasetError(f'the {len(shards)} Parquet files from "{shards[0]}" on hold no rows')
    arrays, classes = {"groups": groups}, None
    if label:
        labels = Labels([(file.names, file.places) for file in scanned])
        arrays["labels"] = labels.numbers
        classes = _recorded_classes(scanned, shards) or labels.classes
    facts = {
        "classes": classes,
        "leaves": [file.leaf for file in scanned],
        "group_bytes": max(file.group_bytes for file in scanned),
    }
    return arrays, facts


def _recorded_classes(scanned: list[_File], shards: list[Path]) -> list[str] | None:
    for file, path in zip(scanned, shards, strict=True):
        if file.classes != scanned[0].classes:
            raise DatasetError(
                f'"{path}" records other class names than "{shards[0]}", so its labels mean other things: '
                "choose the files of one dataset with pattern="
            )
    return scanned[0].classes


def _scan(path: Path, *, image: str, label: str) -> _File:
    """Read the footer of one file and its labels."""
    file = _open(str(path))
    leaf = _image_leaf(file, image, path)
    metadata, number = file.metadata, _leaves(file).index(leaf)
    groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
    names, places = _labels(file, label, path) if label else ([], np.zeros(0, dtype=np.int64))
    return _File(
        rows=[group.num_rows for group in groups],
        group_bytes=max((group.column(number).total_uncompressed_size for group in groups), default=0),
        leaf=leaf,
        names=names,
        places=places,
        classes=_hugging_face_classes(file.schema_arrow, label),
    )


def _image_leaf(file: ParquetFile, image: str, path: Path) -> str:
    """Return the stored column with the encoded images."""
    leaves = _leaves(file)
    leaf = f"{image}.bytes" if f"{image}.bytes" in leaves else image
    if leaf not in leaves:
        raise DatasetError(
            f'"{path}" has no column of images "{image}"{nearest(image, leaves)}, but {", ".join(leaves)}: '
            "choose one with image="
        )
    if file.schema.column(leaves.index(leaf)).physical_type != "BYTE_ARRAY":
        raise DatasetError(f'the column "{leaf}" of "{path}" holds no encoded images: choose another image=')
    return leaf


def _labels(file: ParquetFile, label: str, path: Path) -> tuple[list[str], np.ndarray]:
    """Return the different labels of a file as text, and for every row the place in them."""
    leaves = _leaves(file)
    if label not in leaves:
        raise DatasetError(
            f'"{path}" has no column "{label}"{nearest(label, leaves)}, but {", ".join(leaves)}: choose '
            "another label="
        )
    column = file.read(columns=[label], use_threads=False).column(0).to_pylist()
    wrong = [value for value in column if isinstance(value, bool) or not isinstance(value, int | str)]
    if wrong:
        raise DatasetError(
            f'the column "{label}" of "{path}" holds {wrong[0]!r}; a label is a whole number or a name'
        )
    values = sorted(set(column))
    place = {value: number for number, value in enumerate(values)}
    return [str(value) for value in values], np.array([place[value] for value in column], dtype=np.int64)


def _hugging_face_classes(schema: Schema, label: str) -> list[str] | None:
    """Return the names of the class numbers that Hugging Face datasets record with a file."""
    try:
        recorded = json.loads((schema.metadata or {})[b"huggingface"])
        names = recorded["info"]["features"][label]["names"]
    except (KeyError, ValueError, TypeError):
        return None
    return [str(name) for name in names]
