"""The files of the index of :class:`~dinov2.data.datasets.Pathology`: rows, slide names, skipped files.

The rows, ``entries-TRAIN.npy``, are the forks'. ``slides-TRAIN.json`` says which slides they mean, so that
the folders may change: ``{"entries": fingerprint of the rows, "slides": [[name, ...] per folder]}``; where
not all tiles are ``.jpeg``, also ``"suffixes": [".jpeg", ".png"]`` and ``"suffix_of": ["0010", ...]``, a
digit per slide.
"""

import json
import logging
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from pathlib import Path

import numpy as np

from dinov2.data.datasets.arrays import PackedStrings, atomic_file, writing
from dinov2.errors import DatasetError

logger = logging.getLogger("dinov2")

ENTRY_DTYPE = np.dtype([("actual_index", "<u4"), ("dir_index", "<u4"), ("dataset_index", "<u4")])
DEFAULT_SUFFIX = ".jpeg"
_FINGERPRINT_ROWS = 256
_BLOCK_SLIDES = 64


class IndexFiles:
    """Paths of the files of one index.

    Args:
        folder: the ``extra`` of a dataset string.
        split: in capitals.
    """

    def __init__(self, folder: str, split: str) -> None:
        def path(name: str) -> str:
            return str(Path(folder, name))

        self.entries = path(f"entries-{split}.npy")
        self.names = path(f"slides-{split}.json")
        # Written before the rows and renamed after them: one of the two names files always fits the rows.
        self.next_names = path(f"slides-{split}.next.json")
        self.skipped = path(f"skipped-{split}.csv")
        self.journal = path(f"journal-{split}.txt")
        self.lock = path(f"builder-{split}.lock")


@dataclass(frozen=True)
class SlideNames:
    """The slides of one patches folder, in the order of their numbers.

    Attributes:
        names: of the folders.
        suffixes: of their tiles, each index a slide; None if all are ``.jpeg``.
        suffix_of: digit of each slide, an index into ``suffixes``.
    """

    names: PackedStrings
    suffixes: tuple[str, ...] = (DEFAULT_SUFFIX,)
    suffix_of: str = ""

    def suffix(self, slide_number: int) -> str:
        """Return the suffix of the tiles of a slide."""
        return self.suffixes[int(self.suffix_of[slide_number])] if self.suffix_of else DEFAULT_SUFFIX


def write_index(
    files: IndexFiles,
    rows: Iterable[tuple[int, int, np.ndarray]],
    total: int,
    names: list[list[str]],
    suffixes: list[list[str]],
) -> None:
    """Write the rows and the names of an index; a reader finds the old index or the new one at any moment.

    Args:
        files: where to.
        rows: (number of the folder, number of the slide within it, numbers of its tiles), in their order.
        total: number of all tiles.
        names: of the slides, by folder.
        suffixes: of their tiles, by folder.

    Raises:
        OutputError: a file can not be written.
    """
    header = BytesIO()
    description = {"descr": ENTRY_DTYPE.descr, "fortran_order": False, "shape": (total,)}
    np.lib.format.write_array_header_1_0(header, description)
    with atomic_file(files.entries) as file:
        file.write(header.getvalue())
        for block in _blocks(rows):
            file.write(block.tobytes())
        file.flush()
        fingerprint = index_fingerprint(np.load(file.name, mmap_mode="r"))
        write_slide_names(files.next_names, fingerprint, names, suffixes)
    with writing(files.names):
        Path(files.next_names).replace(files.names)


def _blocks(rows: Iterable[tuple[int, int, np.ndarray]]) -> Iterator[np.ndarray]:
    """Yield the rows of several slides at a time, ``_BLOCK_SLIDES``."""
    rows = iter(rows)
    while some := list(islice(rows, _BLOCK_SLIDES)):
        folders, slides, numbers = zip(*some, strict=True)
        counts = [len(of_slide) for of_slide in numbers]
        block = np.empty(sum(counts), dtype=ENTRY_DTYPE)
        block["actual_index"] = np.concatenate(numbers)
        block["dir_index"] = np.repeat(slides, counts)
        block["dataset_index"] = np.repeat(folders, counts)
        yield block


def index_fingerprint(entries: np.ndarray) -> list[int]:
    """Number of rows and a checksum of some hundred of them, spread evenly: cheap for any size."""
    sample = entries[:: max(1, len(entries) // _FINGERPRINT_ROWS)]
    return [len(entries), zlib.crc32(np.ascontiguousarray(sample).tobytes())]


def write_slide_names(
    path: str, fingerprint: list[int], names: list[list[str]], suffixes: list[list[str]]
) -> None:
    """Record the slides of an index beside it.

    Args:
        path: the file.
        fingerprint: of the index.
        names: of the slide folders, in the index's order, for each patches folder.
        suffixes: of their tiles, likewise.

    Raises:
        OutputError: it can not be written.
    """
    content = {"entries": fingerprint, "slides": names}
    used = sorted({suffix for of_folder in suffixes for suffix in of_folder})
    if used not in ([], [DEFAULT_SUFFIX]):
        digit = {suffix: str(number) for number, suffix in enumerate(used)}
        content["suffixes"] = used
        content["suffix_of"] = ["".join(digit[suffix] for suffix in of_folder) for of_folder in suffixes]
    with atomic_file(path) as file:
        file.write(json.dumps(content).encode("ascii"))


def read_slide_names(files: IndexFiles, entries: np.ndarray) -> list[SlideNames] | None:
    """Return the slides recorded with an index; None if there are none, as beside an index of the forks.

    Names that belong to another index are left aside with a warning.

    Raises:
        DatasetError: the file is damaged.
    """
    fingerprint = index_fingerprint(entries)
    for path in (files.names, files.next_names):
        content = _read_json(path)
        if content is not None and content["entries"] == fingerprint:
            suffixes = tuple(content.get("suffixes", (DEFAULT_SUFFIX,)))
            suffix_of = content.get("suffix_of", [""] * len(content["slides"]))
            folders = zip(content["slides"], suffix_of, strict=True)
            return [SlideNames(PackedStrings(names), suffixes, digits) for names, digits in folders]
    if Path(files.names).is_file():
        logger.warning('"%s" was made for another index and is not used; build the index again', files.names)
    return None


def _read_json(path: str) -> dict | None:
    try:
        content = json.loads(Path(path).read_text("ascii"))
        return content if {"entries", "slides"} <= set(content) else None
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise DatasetError(f'"{path}" is damaged ({error}): build the index again') from error
