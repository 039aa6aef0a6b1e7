"""Which slides a dataset is made of: the files of a folder, or the lines of a CSV."""

from dataclasses import dataclass
from pathlib import Path

from dinov2.data.datasets.class_numbers import class_numbers
from dinov2.data.datasets.folders import files_matching, folders_below, without_repeats
from dinov2.data.datasets.path_map import PathMap
from dinov2.data.slides.dicom import DICOM_SUFFIX, first_of_each_series
from dinov2.data.slides.slide_csv import SlideLine, read_slide_csv
from dinov2.errors import DatasetError

SLIDE_SUFFIXES = (
    *(".svs", ".tif", ".tiff", ".qptiff", ".scn", ".bif"),
    *(".ndpi", ".mrxs", ".vms", ".vmu", ".svslide"),
)
FOUND_SUFFIXES = (*SLIDE_SUFFIXES, DICOM_SUFFIX)


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
    """List the slide files below a folder, sorted by path; links to folders are followed.

    Args:
        root: the folder.
        pattern: names or globs below it, separated by commas; empty means every file with the suffix of a
            slide format.

    Raises:
        DatasetError: there are none, or the pattern is none.
    """
    if pattern:
        parts = [part.strip() for part in pattern.split(",") if part.strip()] or [""]
        found = {path for part in parts for path in files_matching(root, part, example="*.svs")}
    else:
        found = slide_files_below(root)
    paths = [str(Path(path).absolute()) for path in without_repeats(root, found)]
    if not paths:
        wanted = pattern or " ".join(FOUND_SUFFIXES)
        raise DatasetError(f'Slides finds no slide in "{root}" ({wanted}): correct root or pattern')
    return [SlideSource(path) for path in paths]


def slide_files_below(root: str) -> list[str]:
    """Return the slide files in a folder and below it, behind links as well; of DICOM one of each series."""
    files = [
        path
        for parent, names in folders_below(root)
        for name in names
        if (path := Path(parent, name)).suffix.lower() in FOUND_SUFFIXES and path.is_file()
    ]
    dicom = [path for path in files if path.suffix.lower() == DICOM_SUFFIX]
    others = [path for path in files if path.suffix.lower() != DICOM_SUFFIX]
    return [str(path) for path in (*others, *first_of_each_series(dicom))]


def slides_of_manifest(
    path: str, *, root: str = "", split: str = "", path_map: PathMap | None = None
) -> tuple[list[SlideSource], list[str]]:
    """Read the slides of a CSV with a header line, in its order, and the names of their classes.

    Labels that are whole numbers are kept, others are numbered in the order of the alphabet over the whole
    file, whatever part of it is taken.

    Args:
        path: the CSV, see :func:`~dinov2.data.slides.slide_csv.read_slide_csv`; lines with 0 in the column
            ``process`` are left out.
        root: folder of relative paths; empty means the folder of the CSV.
        split: which lines to take, by the column ``split``; empty means all.
        path_map: where recorded folders lie here, for the paths in the file.

    Raises:
        DatasetError: the file is missing or unusable, or has no line of the split.
    """
    columns, listed = read_slide_csv(path, root=root, path_map=path_map)
    lines = [line for line in listed if line.process]
    if not lines:
        left_out = f" but the {len(listed)} with 0 in the column process" if listed else ""
        raise DatasetError(f'"{path}" lists no slide{left_out}: add a line for each')
    numbers, classes = _number_labels(listed, path) if "label" in columns else ({}, [])
    if split and "split" not in columns:
        raise DatasetError(f'"{path}" has no column split, so split={split} selects nothing: leave it out')
    sources = [
        SlideSource(line.path, line.mpp, numbers.get(line.label), line.mask)
        for line in lines
        if not split or line.split.lower() == split.lower()
    ]
    if not sources:
        splits = sorted({line.split for line in lines})
        raise DatasetError(f'"{path}" lists no slide of the split "{split}"; it has {splits}')
    return sources, classes


def _number_labels(lines: list[SlideLine], path: str) -> tuple[dict[str, int], list[str]]:
    for line in lines:
        if line.process and not line.label:
            raise DatasetError(f'line {line.line} of "{path}" has no label: give every slide one')
    numbers, classes = class_numbers((line.label for line in lines if line.label), f'"{path}"')
    return numbers, classes or []
