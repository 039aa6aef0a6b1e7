"""DICOM slides in folders: a series has a file per level, and any of them opens all."""

import re
from collections.abc import Iterable
from pathlib import Path

DICOM_SUFFIX = ".dcm"

# Where the identifier stands: ahead of the pixels, in files of any size.
HEADER_BYTES = 2**16
# Tag (0020,000E), SeriesInstanceUID, in explicit little endian, which files of whole slides have; its length.
SERIES = re.compile(rb"\x20\x00\x0e\x00UI(..)", re.DOTALL)


def first_of_each_series(paths: Iterable[Path]) -> list[Path]:
    """Return, sorted, one file of every series in each folder: the first by name.

    A file whose series can not be told is returned, too: opening it says what is wrong with it.
    """
    seen: set[tuple[Path, str]] = set()
    first = []
    for path in sorted(paths):
        series = (path.parent, series_of(path) or path.name)
        if series not in seen:
            seen.add(series)
            first.append(path)
    return first


def series_of(path: Path) -> str:
    """Return the identifier of a file's series; empty where it is none or can not be read."""
    try:
        with path.open("rb") as file:
            header = file.read(HEADER_BYTES)
    except OSError:
        return ""
    found = SERIES.search(header)
    if header[128:132] != b"DICM" or found is None:
        return ""
    length = int.from_bytes(found[1], "little")
    return header[found.end() : found.end() + length].rstrip(b"\0 ").decode("ascii", "replace")


def name_in_folder(path: Path) -> str:
    """Return the name of a slide found in a folder: its file's, of a DICOM series the name of its folder."""
    dicom = path.suffix.lower() == DICOM_SUFFIX and series_of(path)
    return path.parent.name if dicom else path.stem
