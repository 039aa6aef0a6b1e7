"""Which slides to work on: a folder, a pattern, or a table with a line per slide."""

import csv
import glob
import os
from dataclasses import dataclass
from pathlib import Path

from dinov2.data.slides.sources import SLIDE_SUFFIXES
from dinov2.errors import DatasetError, nearest

COLUMNS = ("slide", "path", "mpp", "mask", "process")
_NO = ("0", "false", "no", "n")
_YES = ("", "1", "true", "yes", "y")


@dataclass(frozen=True)
class SlideEntry:
    """A slide to work on.

    Args:
        name: under which its output is stored; no other slide has it.
        path: of the file.
        mpp: um per level-0 pixel if the user knows better than the file.
        mask: path of a tissue mask to use in place of the segmentation.
        process: False for slides that are listed but left out.
    """

    name: str
    path: str
    mpp: float | None = None
    mask: str | None = None
    process: bool = True


def list_slides(source: str) -> list[SlideEntry]:
    """Return the slides of a source, sorted by name.

    Args:
        source: a folder (searched with its subfolders), a pattern such as ``/data/**/*.svs``, one slide file,
            or a CSV with a column ``path`` (or ``slide``) and any of ``slide`` (the name to store it under),
            ``mpp``, ``mask``, ``process`` (0 leaves it out). Relative paths count from the folder of the CSV.

    Raises:
        DatasetError: nothing is found, the table is wrong, or two slides have one name.
    """
    path = Path(source)
    if path.is_file() and path.suffix.lower() == ".csv":
        entries = _read_table(path)
    elif path.is_file():
        entries = [SlideEntry(path.stem, str(path))]
    elif path.is_dir():
        entries = [SlideEntry(found.stem, str(found)) for found in _walk(path)]
    else:
        matches = sorted(glob.glob(source, recursive=True))  # noqa: PTH207
        entries = [SlideEntry(Path(match).stem, match) for match in matches if Path(match).is_file()]
    if not entries:
        raise DatasetError(
            f'there is no slide in "{source}": give a folder with {" ".join(SLIDE_SUFFIXES)} files, '
            "a pattern in quotes, or a CSV with the column path"
        )
    _check_names(entries)
    return sorted(entries, key=lambda entry: entry.name)


def _walk(folder: Path) -> list[Path]:
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [
            Path(parent, name)
            for name in sorted(names)
            if not name.startswith(".") and Path(name).suffix.lower() in SLIDE_SUFFIXES
        ]
    return found


def _read_table(path: Path) -> list[SlideEntry]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or []
        for column in columns:
            if column not in COLUMNS and nearest(column, COLUMNS):
                raise DatasetError(f'"{path}" has a column "{column}"{nearest(column, COLUMNS)}: rename it')
        if "path" not in columns and "slide" not in columns:
            raise DatasetError(f'"{path}" has the columns {columns}; path is needed, one slide a line')
        return [_entry_of(row, path, number) for number, row in enumerate(reader, start=2)]


def _entry_of(row: dict[str, str | None], table: Path, line: int) -> SlideEntry:
    cell = {column: (row.get(column) or "").strip() for column in COLUMNS}
    location = cell["path"] or cell["slide"]
    if not location:
        raise DatasetError(f'line {line} of "{table}" has no path: fill it in or delete the line')
    name = cell["slide"] if cell["path"] and cell["slide"] else Path(location).stem
    if name != Path(name).name or name.startswith("."):
        raise DatasetError(
            f'line {line} of "{table}" names the slide "{name}", which is no name of a folder: '
            "put file paths into the column path"
        )
    if cell["process"].lower() not in _YES + _NO:
        raise DatasetError(
            f'line {line} of "{table}" has "{cell["process"]}" below process; 1 or 0 is accepted'
        )
    try:
        mpp = float(cell["mpp"]) if cell["mpp"] else None
    except ValueError:
        raise DatasetError(
            f'line {line} of "{table}" has "{cell["mpp"]}" below mpp; it takes um per pixel, such as 0.25'
        ) from None
    mask = str(table.parent / cell["mask"]) if cell["mask"] else None
    return SlideEntry(name, str(table.parent / location), mpp, mask, cell["process"].lower() in _YES)


def _check_names(entries: list[SlideEntry]) -> None:
    seen: dict[str, str] = {}
    for entry in entries:
        if entry.name in seen:
            raise DatasetError(
                f'two slides would be stored as "{entry.name}": "{seen[entry.name]}" and "{entry.path}"; '
                "list them in a CSV with the columns path and slide, and give each a slide name of its own"
            )
        seen[entry.name] = entry.path
