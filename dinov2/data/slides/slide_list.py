"""Which slides to work on: a folder, a pattern, or a table with a line per slide."""

import glob
from dataclasses import dataclass
from pathlib import Path

from dinov2.data.datasets.folders import files_matching, without_repeats
from dinov2.data.datasets.path_map import PathMap
from dinov2.data.slides.dicom import name_in_folder
from dinov2.data.slides.slide_csv import read_slide_csv
from dinov2.data.slides.sources import FOUND_SUFFIXES, slide_files_below
from dinov2.errors import DatasetError


@dataclass(frozen=True)
class SlideEntry:
    """A slide to work on.

    Args:
        name: under which its output is stored; no other slide has it.
        path: of the file.
        mpp: um per level-0 pixel if the user knows better than the file.
        mask: path of a tissue mask to use in place of the segmentation.
        process: False for slides that are listed but left out.
        mask_as_given: path of the mask in the list, before the path map, which differs between machines.
    """

    name: str
    path: str
    mpp: float | None = None
    mask: str | None = None
    process: bool = True
    mask_as_given: str | None = None


def list_slides(source: str, *, path_map: PathMap | None = None) -> list[SlideEntry]:
    """Return the slides of a source, sorted by name.

    Args:
        source: a folder (searched with all below it, behind links as well), a pattern such as
            ``/data/**/*.svs``, one slide file, or a CSV, see
            :func:`~dinov2.data.slides.slide_csv.read_slide_csv`, whose column ``slide`` gives the name to
            store it under; its labels and splits are passed over.
        path_map: where recorded folders lie here, for the paths in the CSV.

    Raises:
        DatasetError: nothing is found, the table is wrong, or two slides have one name.
    """
    path = Path(source)
    if path.is_file() and path.suffix.lower() == ".csv":
        entries = _entries_of(source, path_map)
    elif path.is_file():
        entries = [SlideEntry(path.stem, str(path))]
    elif path.is_dir():
        entries = [
            SlideEntry(name_in_folder(Path(found)), found)
            for found in without_repeats(source, slide_files_below(source))
        ]
    else:
        entries = [SlideEntry(Path(found).stem, found) for found in _matching(source)]
    if not entries and not path.exists() and not glob.has_magic(source):
        raise DatasetError(f'"{source}" does not exist: correct the path')
    if not entries:
        raise DatasetError(
            f'there is no slide in "{source}": give a folder with {" ".join(FOUND_SUFFIXES)} files, '
            "a pattern in quotes, or a CSV with the column path"
        )
    _check_names(entries)
    return sorted(entries, key=lambda entry: entry.name)


def _matching(pattern: str) -> list[str]:
    """Return the files that fit a pattern, each once, without those that a shell would hide."""
    parts = Path(pattern).parts
    at = next((number for number, part in enumerate(parts) if glob.has_magic(part)), None)
    if at is None:
        return []
    root, below = Path(*parts[:at]), "/".join(parts[at:])
    shown = [
        path
        for path in files_matching(str(root), below, example="*.svs")
        if "/." in f"/{below}" or not any(part[0] == "." for part in path.relative_to(root).parts)
    ]
    return without_repeats(str(root), shown)


def _entries_of(table: str, path_map: PathMap | None) -> list[SlideEntry]:
    lines = read_slide_csv(table, path_map=path_map)[1]
    for line in lines:
        if line.name != Path(line.name).name or line.name.startswith("."):
            raise DatasetError(
                f'line {line.line} of "{table}" has "{line.name}" below slide, which is no name of a folder: '
                "put file paths into the column path"
            )
    return [
        SlideEntry(
            line.name, line.path, line.mpp, line.mask or None, line.process, line.mask_as_given or None
        )
        for line in lines
    ]


def _check_names(entries: list[SlideEntry]) -> None:
    seen: dict[str, str] = {}
    for entry in entries:
        if entry.name in seen:
            raise DatasetError(
                f'two slides would be stored as "{entry.name}": "{seen[entry.name]}" and "{entry.path}"; '
                "list them in a CSV with the columns path and slide, and give each a slide name of its own"
            )
        seen[entry.name] = entry.path
