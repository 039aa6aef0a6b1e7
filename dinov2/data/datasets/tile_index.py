"""Writing and checking the index of :class:`~dinov2.data.datasets.Pathology`."""

import json
import logging
import os
import re
import zlib
from collections import Counter
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np

from dinov2.data.datasets.arrays import atomic_file
from dinov2.errors import DatasetError

logger = logging.getLogger("dinov2")

ENTRY_DTYPE = np.dtype([("actual_index", "<u4"), ("dir_index", "<u4"), ("dataset_index", "<u4")])
SUFFIX = ".jpeg"
OTHER_IMAGE_SUFFIXES = (".jpg", ".png", ".tif", ".tiff", ".bmp", ".webp")
_NUMBER = re.compile(r"0|[1-9]\d*", re.ASCII)
_FINGERPRINT_ROWS = 256


def tile_name(slide: str, number: int) -> str:
    """Return the file name of a tile."""
    return f"{slide}_patch_{number}{SUFFIX}"


def write_tile_index(folders: list[str], entries_path: str, names_path: str) -> int:
    """List the tiles of all patches folders, write the index and the slide names; return the number of tiles.

    Files that are no tiles are left out and counted in the log.

    Raises:
        DatasetError: there are no tiles.
        OutputError: the index can not be written.
    """
    strays: Counter[str] = Counter()
    slides_by_folder = [sorted(os.listdir(folder)) for folder in folders]  # noqa: PTH208
    with atomic_file(entries_path) as file:
        total = 0
        header_bytes = _write_header(file, 0)
        for folder_number, (folder, slides) in enumerate(zip(folders, slides_by_folder, strict=True)):
            for slide_number, slide in enumerate(slides):
                numbers = _tile_numbers(f"{folder}/{slide}", slide, strays)
                rows = np.empty(len(numbers), dtype=ENTRY_DTYPE)
                rows["actual_index"] = numbers
                rows["dir_index"] = slide_number
                rows["dataset_index"] = folder_number
                file.write(rows.tobytes())
                total += len(rows)
        _report_strays(strays, total, folders)
        file.seek(0)
        assert _write_header(file, total) == header_bytes
    _write_slide_names(names_path, slides_by_folder, np.load(entries_path, mmap_mode="r"))
    return total


def _tile_numbers(slide_folder: str, slide: str, strays: Counter[str]) -> list[int]:
    """Return the sorted numbers of a slide's tiles, counting other files by suffix."""
    prefix = f"{slide}_patch_"
    numbers = []
    try:
        with os.scandir(slide_folder) as entries:
            names = [entry.name for entry in entries]
    except NotADirectoryError:
        strays[Path(slide_folder).suffix.lower()] += 1
        return []
    except OSError as error:
        logger.warning('"%s" can not be listed and is left out: %s', slide_folder, error)
        return []
    for name in names:
        number = name[len(prefix) : -len(SUFFIX)]
        # The index keeps the number alone, so the name must be the one that is made from it again.
        if name.startswith(prefix) and name.endswith(SUFFIX) and _NUMBER.fullmatch(number):
            numbers.append(int(number))
        else:
            strays[Path(name).suffix.lower()] += 1
    return sorted(numbers)


def _report_strays(strays: Counter[str], total: int, folders: list[str]) -> None:
    listed = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in strays.most_common())
    if not total:
        found = f"; it found {listed}" if strays else ""
        other = any(suffix in strays for suffix in OTHER_IMAGE_SUFFIXES)
        advice = (
            "convert the images, or use ImageFolder or CustomImageDataset" if other else "check entry.csv"
        )
        raise DatasetError(
            f"Pathology finds no tile <slide>/<slide>_patch_<number>{SUFFIX} below {', '.join(folders[:3])}"
            f"{found}: {advice}"
        )
    if strays:
        logger.warning("%d files are no tiles and were left out: %s", strays.total(), listed)


def _write_header(file: BinaryIO, rows: int) -> int:
    """Write the header of an ``.npy`` file; return its length, which is the same for any number of rows."""
    buffer = BytesIO()
    description = {"descr": ENTRY_DTYPE.descr, "fortran_order": False, "shape": (rows,)}
    np.lib.format.write_array_header_1_0(buffer, description)
    return file.write(buffer.getvalue())


def _fingerprint(entries: np.ndarray) -> list[int]:
    """Number of rows and a checksum of some hundred of them, spread evenly: cheap for any size."""
    sample = entries[:: max(1, len(entries) // _FINGERPRINT_ROWS)]
    return [len(entries), zlib.crc32(np.ascontiguousarray(sample).tobytes())]


def _write_slide_names(path: str, slides_by_folder: list[list[str]], entries: np.ndarray) -> None:
    content = {"entries": _fingerprint(entries), "slides": slides_by_folder}
    with atomic_file(path) as file:
        file.write(json.dumps(content).encode("ascii"))


def read_slide_names(path: str, entries: np.ndarray) -> list[list[str]] | None:
    """Return the slide names recorded with an index; None if there are none, as beside an index of the forks.

    Names that belong to another index are left aside with a warning.
    """
    if not Path(path).is_file():
        return None
    content = json.loads(Path(path).read_text("ascii"))
    if content["entries"] != _fingerprint(entries):
        logger.warning('"%s" was made for another index and is not used; build the index again', path)
        return None
    return content["slides"]
