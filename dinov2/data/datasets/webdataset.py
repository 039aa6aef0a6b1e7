"""Images in tar shards as the ``webdataset`` library writes them, read in place and in any order.

Consecutive members with the same name up to the first dot of the file name are one sample:
``000123.jpg`` and ``000123.cls``. Where each image lies and what its label is are collected once, from the
headers, into an index beside the shards or in ``extra``; a shard that changes is noticed by size and time.
"""

import json
import logging
import re
from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dinov2.data.datasets.extended import ExtendedVisionDataset
from dinov2.data.datasets.process_cache import OpenFile, ProcessCache
from dinov2.data.datasets.shard_index import Labels, ShardIndex, for_each_shard, list_shards
from dinov2.data.datasets.tar_index import BLOCK_BYTES, TarMember, TruncatedTarError, member_name, tar_members
from dinov2.errors import DatasetError, ImageReadError

logger = logging.getLogger("dinov2")

IMAGE_KEYS = ("jpg", "jpeg", "png", "tif", "tiff", "webp", "bmp")
SAMPLE_DTYPE = np.dtype([("offset", "<u8"), ("size", "<u4"), ("shard", "<u4")])
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)
_Parts = dict[str, TarMember]  # of one sample, by the part of the name behind the first dot


class _Shard(NamedTuple):
    samples: np.ndarray  # SAMPLE_DTYPE, the column shard still 0
    names: list[str]  # different labels
    places: np.ndarray  # label of every sample, as place in names
    without_image: int  # samples left out
    broken: str  # what is wrong with the end of the shard, or nothing


class WebDataset(ExtendedVisionDataset):
    """Images in plain tar shards, with or without labels.

    Args:
        root: folder of the shards, or one shard.
        pattern: which files of the folder are shards; ``**/*.tar`` looks into folders below, too.
        extra: folder of the index; empty means the folder of the shards.
        image: what an image is called behind the first dot of its name, such as ``jpg``; ``auto`` takes the
            one of jpg, jpeg, png, tif, tiff, webp and bmp that a sample has.
        label: ``cls`` (a member that holds a whole number or a name), ``json.field`` (a field of the member
            json), or empty for no labels. Names are numbered in the order of the alphabet.
        truncated: ``error`` refuses a shard that breaks off, ``use`` takes the samples before the break.
        open_files: shards kept open per process.
        transforms, transform, target_transform: as for torchvision's datasets.

    Raises:
        DatasetError: there are no shards, one is compressed, broken or no tar archive, or a sample has no
            label or more than one image.
        OutputError: the index can not be written.
    """

    def __init__(
        self,
        *,
        root: str,
        pattern: str = "*.tar",
        extra: str = "",
        image: str = "auto",
        label: str = "",
        truncated: str = "error",
        open_files: int = 16,
        transforms: Callable | None = None,
        transform: Callable | None = None,
        target_transform: Callable | None = None,
    ) -> None:
        if truncated not in ("error", "use"):
            raise DatasetError(f'truncated of WebDataset is "{truncated}"; it takes error or use')
        super().__init__(root, transforms, transform, target_transform)
        shards = list_shards(root, pattern, dataset="WebDataset")
        options = {"pattern": pattern, "image": image, "label": label, "truncated": truncated}
        index = ShardIndex(extra, kind="webdataset", root=root, shards=shards, options=options)
        arrays, facts = index.load_or_build(partial(_build, shards, image.lower(), label, truncated))
        for sentence in facts["warnings"]:
            logger.warning("%s", sentence)
        self.classes: list[str] | None = facts["classes"]
        self._samples = arrays["samples"]
        self._labels = arrays.get("labels")
        self._shards = [str(path) for path in shards]
        self._files = ProcessCache(open_files)

    def __len__(self) -> int:
        return len(self._samples.get())

    def get_image_path(self, index: int) -> str:
        """Return the shard and the name of an image within it, or its place if the shard has gone."""
        sample = self._samples.get()[index]
        shard, offset = self._shards[sample["shard"]], int(sample["offset"])
        try:
            header = self._files.get(shard, OpenFile).read(offset - BLOCK_BYTES, BLOCK_BYTES)
        except (OSError, ImageReadError):
            return f"{shard}:byte {offset}"
        return f"{shard}:{member_name(header)}"

    def get_image_data(self, index: int) -> bytes:
        """Return the encoded image of a sample."""
        sample = self._samples.get()[index]
        shard = self._files.get(self._shards[sample["shard"]], OpenFile)
        return shard.read(int(sample["offset"]), int(sample["size"]))

    def get_target(self, index: int) -> int | None:
        """Return the class number of a sample, None without ``label``."""
        return None if self._labels is None else int(self._labels.get()[index])

    def get_targets(self) -> np.ndarray:
        """Return the class numbers of all samples, int64.

        Raises:
            DatasetError: no ``label`` was asked for.
        """
        if self._labels is None:
            raise DatasetError(
                f'"{self.root}" was opened without labels: add label=cls or label=json.<field> to WebDataset'
            )
        return self._labels.get()


def _build(
    shards: list[Path], image: str, label: str, truncated: str
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read the headers of all shards; return the arrays and facts of the index."""
    logger.info("WebDataset: reading the headers of %d shards, once", len(shards))
    scanned = for_each_shard(partial(_scan, image=image, label=label), shards)
    for number, shard in enumerate(scanned):
        shard.samples["shard"] = number
    samples = np.concatenate([shard.samples for shard in scanned])
    broken = [shard for shard in scanned if shard.broken]
    if broken and truncated == "error":
        raise DatasetError(
            f"{broken[0].broken} ({len(broken)} of {len(shards)} shards are): copy it again, or add "
            "truncated=use to take the complete samples before the break"
        )
    sentences = [f"{shard.broken}: its {len(shard.samples)} complete samples are used" for shard in broken]
    left_out = sum(shard.without_image for shard in scanned)
    wanted = ", ".join(IMAGE_KEYS) if image == "auto" else image
    if left_out:
        sentences.append(f"{left_out} samples without an image ({wanted}) were left out")
    if not len(samples):
        raise DatasetError(
            f'the {len(shards)} shards from "{shards[0]}" on hold no image ({wanted}); say with image= what '
            "images are called behind the first dot of their names"
        )
    arrays = {"samples": samples}
    labels = Labels([(shard.names, shard.places) for shard in scanned]) if label else None
    if labels is not None:
        arrays["labels"] = labels.numbers
    return arrays, {"classes": labels.classes if labels else None, "warnings": sentences}


def _scan(path: Path, *, image: str, label: str) -> _Shard:
    """List the images of one shard and read its labels."""
    rows, labels, broken, without_image = [], [], [], 0
    file = OpenFile(str(path))
    for key, parts in _samples_of(path, broken):
        if broken and label and _member_of(label) not in parts:
            continue  # the break took the label of this sample, its last
        member = _image_of(parts, image, f"{path}:{key}")
        if member is None:
            without_image += 1
            continue
        rows.append((member.offset, member.size, 0))
        if label:
            labels.append(_label_of(parts, label, file, f"{path}:{key}"))
    names, places = np.unique(np.array(labels, dtype=np.str_), return_inverse=True)
    samples = np.array(rows, dtype=SAMPLE_DTYPE)
    return _Shard(samples, names.tolist(), places.reshape(-1), without_image, "".join(broken))


def _samples_of(path: Path, broken: list[str]) -> Iterator[tuple[str, _Parts]]:
    """Yield key and parts of the samples of a shard; what cuts it off goes to ``broken``."""
    for key, members in groupby(_named_members(path, broken), key=lambda item: item[0]):
        parts: _Parts = {}
        for _, ending, member in members:
            if ending in parts:
                raise DatasetError(
                    f'"{path}" holds "{key}.{ending}" twice in a row: give every sample a name of its own'
                )
            parts[ending] = member
        yield key, parts


def _named_members(path: Path, broken: list[str]) -> Iterator[tuple[str, str, TarMember]]:
    try:
        for member in tar_members(path):
            match = _NAME.fullmatch(member.name)
            if match:
                yield match[1], match[2].lower(), member
    except TruncatedTarError as error:
        broken.append(str(error))


def _image_of(parts: _Parts, image: str, where: str) -> TarMember | None:
    found = [ending for ending in (IMAGE_KEYS if image == "auto" else (image,)) if ending in parts]
    if len(found) > 1:
        raise DatasetError(f'"{where}" has images {" and ".join(found)}: choose with image={found[0]}')
    return parts[found[0]] if found else None


def _member_of(label: str) -> str:
    """Return what the member with the label is called behind the first dot."""
    return "json" if label.startswith(("json.", "json:")) else label.lower()


def _label_of(parts: _Parts, label: str, file: OpenFile, where: str) -> str:
    """Return a label as text."""
    ending = _member_of(label)
    if ending not in parts:
        raise DatasetError(f'"{where}" has no label .{ending}, but {sorted(parts)}: choose another label=')
    member = parts[ending]
    text = file.read(member.offset, member.size).decode("utf-8", "replace").strip()
    if ending != "json":
        return text
    field = label[len("json.") :]
    try:
        value = json.loads(text)[field]
    except (ValueError, KeyError, TypeError) as error:
        raise DatasetError(
            f'the json of "{where}" has no field "{field}": choose another label=json.<field>'
        ) from error
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise DatasetError(
            f'the label "{field}" of "{where}" is {value!r}; a label is a whole number or a name'
        )
    return str(value)
