"""Which slides a dataset is made of: the files of a folder, or the lines of a CSV."""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dinov2.errors import DatasetError, nearest

SLIDE_SUFFIXES = (
    *(".svs", ".tif", ".tiff", ".qptiff", ".scn", ".bif"),
    *(".ndpi", ".mrxs", ".vms", ".vmu", ".svslide"),
)
COLUMNS = ("path", "slide", "mpp", "label", "split", "mask")


@dataclass(frozen=True)
class SlideSource:
    """A slide and what is known about it.

    Attributes:
        path: of the slide file.
        mpp: um per level-0 pixel, None to take it from the file.
        label: class number, None without labels.
        mask: file of a tissue mask, empty to find the tissue.
        coords: HDF5 file of tile corners, empty to lay a grid.
    """

    path: str
    mpp: float | None = None
    label: int | None = None
    mask: str = ""
    coords: str = ""


def slides_of_folder(root: str, pattern: str = "") -> list[SlideSource]:
    """List the slide files below a folder, sorted by path.

    Args:
        root: the folder.
        pattern: names or globs below it, separated by commas; empty means every file with the suffix of a
            slide format.

    Raises:
        DatasetError: there are none.
    """
    if pattern:
        found = {path for part in pattern.split(",") for path in Path(root).glob(part.strip())}
    else:
        found = {path for path in Path(root).rglob("*") if path.suffix.lower() in SLIDE_SUFFIXES}
    paths = sorted(str(path.absolute()) for path in found if path.is_file())
    if not paths:
        wanted = pattern or " ".join(SLIDE_SUFFIXES)
        raise DatasetError(f'Slides finds no slide in "{root}" ({wanted}): correct root or pattern')
    return [SlideSource(path) for path in paths]


def slides_of_manifest(path: str, *, root: str = "", split: str = "") -> tuple[list[SlideSource], list[str]]:
    """Read the slides of a CSV with a header line, in its order, and the names of their classes.

    The column ``path`` (or ``slide``) is needed; ``mpp``, ``label``, ``split``, ``mask`` are optional. Labels
    that are whole numbers are kept, others are numbered in the order of the alphabet over the whole file.

    Args:
        path: the CSV.
        root: folder of relative paths; empty means the folder of the CSV.
        split: which lines to take, by the column ``split``; empty means all.

    Raises:
        DatasetError: the file is missing or unusable, or has no line of the split.
    """
    columns, rows = _read_rows(path)
    labels, classes = (
        _number_labels([row["label"] for row in rows], path) if "label" in columns else (None, [])
    )
    if split and "split" not in columns:
        raise DatasetError(f'"{path}" has no column split, so split={split} selects nothing: leave it out')
    # Absolute, because the tiles found once are used from other working directories.
    folder = (Path(root) if root else Path(path).parent).absolute()
    sources = [
        SlideSource(
            path=str(folder / (row["path"] or row["slide"])),
            mpp=_mpp(row["mpp"], path, line),
            label=None if labels is None else int(labels[line]),
            mask=str(folder / row["mask"]) if row["mask"] else "",
        )
        for line, row in enumerate(rows)
        if not split or row["split"].lower() == split.lower()
    ]
    if not sources:
        splits = sorted({row["split"] for row in rows})
        raise DatasetError(f'"{path}" lists no slide of the split "{split}"; it has {splits}')
    return sources, classes


def _read_rows(path: str) -> tuple[list[str], list[dict[str, str]]]:
    """Return the names of the columns and the lines, in which a missing column is empty."""
    if not Path(path).is_file():
        raise DatasetError(f'the manifest "{path}" of Slides is missing: give a CSV with the column path')
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, skipinitialspace=True, restval="")
            columns = [name.strip().lower() for name in reader.fieldnames or ()]
            reader.fieldnames = columns
            rows = [{name: (row.get(name) or "").strip() for name in COLUMNS} for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f'the manifest "{path}" is no CSV file in UTF-8 ({error})') from error
    for name in columns:
        if name not in COLUMNS and nearest(name, COLUMNS):
            raise DatasetError(
                f'the manifest "{path}" has a column "{name}"{nearest(name, COLUMNS)}: rename it'
            )
    for line, row in enumerate(rows, start=1):
        if not row["path"] and not row["slide"]:
            raise DatasetError(f'slide {line} of the manifest "{path}" has no path: it needs a column path')
    if not rows:
        raise DatasetError(f'the manifest "{path}" lists no slide')
    return columns, rows


def _number_labels(labels: list[str], path: str) -> tuple[np.ndarray, list[str]]:
    if "" in labels:
        raise DatasetError(f'slide {labels.index("") + 1} of "{path}" has no label: give every line one')
    try:
        return np.array([int(label) for label in labels], dtype=np.int64), []
    except ValueError:
        classes, numbers = np.unique(labels, return_inverse=True)
        return numbers.astype(np.int64), classes.tolist()


def _mpp(text: str, path: str, line: int) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        raise DatasetError(
            f'slide {line + 1} of "{path}" has the mpp "{text}"; it takes um per level-0 pixel, such as 0.25'
        ) from None
