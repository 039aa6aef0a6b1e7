"""Tables of slides, CSV with a header line: the one format of the ``Slides`` dataset and of the tiler."""

import csv
from dataclasses import dataclass
from pathlib import Path

from dinov2.data.datasets.csv_text import csv_lines
from dinov2.data.datasets.path_map import PathMap
from dinov2.errors import DatasetError, nearest

COLUMNS = ("path", "slide", "mpp", "mask", "label", "split", "process")
_NO = ("0", "false", "no", "n")
_YES = ("", "1", "true", "yes", "y")
# Columns of the user's own are welcome: only what differs in a letter or two is taken for a mistake.
_ALIKE = 0.8


@dataclass(frozen=True)
class SlideLine:
    """A line of a table of slides.

    Attributes:
        line: its number in the file, for messages; the header is line 1.
        path: of the slide file.
        name: what the column ``slide`` calls it, the name of the file without its suffix if it is empty.
        mpp: um per level-0 pixel, None if the table does not say.
        mask: path of a tissue mask, empty without.
        mask_as_given: the same as it stands in the table, before the path map.
        label: as written, empty without.
        split: as written, empty without.
        process: False leaves the slide out.
    """

    line: int
    path: str
    name: str
    mpp: float | None
    mask: str
    mask_as_given: str
    label: str
    split: str
    process: bool


def read_slide_csv(
    path: str | Path, *, root: str = "", path_map: PathMap | None = None
) -> tuple[list[str], list[SlideLine]]:
    """Return the names of the columns, in lower case, and the lines in their order.

    The column ``path`` (or ``slide`` in its place) is needed; the others of ``COLUMNS`` may be there, and any
    more, which are passed over.

    Args:
        path: the CSV.
        root: folder of relative paths; empty means the folder of the CSV.
        path_map: where recorded folders lie here, for the columns ``path`` and ``mask``.

    Raises:
        DatasetError: the file is missing, no CSV, or a column or a cell is wrong.
    """
    table, path_map = Path(path), path_map or PathMap()
    if not table.is_file():
        raise DatasetError(f'the table of slides "{path}" is missing: give a CSV with the column path')
    with csv_lines(table) as lines:
        reader = csv.DictReader(lines, skipinitialspace=True, restval="")
        columns = [name.strip().lower() for name in reader.fieldnames or ()]
        _check_columns(columns, table)
        reader.fieldnames = columns
        rows = []
        for row in reader:
            rows.append((reader.line_num, {name: row.get(name, "").strip() for name in COLUMNS}))
    # Absolute, because what is found once is used from other working directories.
    folder = Path(root or table.parent).absolute()
    return columns, [_line_of(number, cells, table, folder, path_map) for number, cells in rows]


def _check_columns(columns: list[str], table: Path) -> None:
    for column in columns:
        if column not in COLUMNS and (hint := nearest(column, COLUMNS, cutoff=_ALIKE)):
            raise DatasetError(f'"{table}" has a column "{column}"{hint}: rename it')
    if "path" not in columns and "slide" not in columns:
        raise DatasetError(f'"{table}" has the columns {columns}; path is needed, one slide a line')


def _line_of(number: int, cells: dict[str, str], table: Path, folder: Path, path_map: PathMap) -> SlideLine:
    place = f'line {number} of "{table}"'
    location = cells["path"] or cells["slide"]
    if not location:
        raise DatasetError(f"{place} has no path: fill it in or delete the line")
    if cells["process"].lower() not in _YES + _NO:
        raise DatasetError(f'{place} has "{cells["process"]}" below process; 1 or 0 is accepted')
    try:
        mpp = float(cells["mpp"]) if cells["mpp"] else None
    except ValueError:
        raise DatasetError(
            f'{place} has "{cells["mpp"]}" below mpp; it takes um per level-0 pixel, such as 0.25'
        ) from None
    return SlideLine(
        line=number,
        path=str(folder / path_map(location)),
        name=cells["slide"] if cells["path"] and cells["slide"] else Path(location).stem,
        mpp=mpp,
        mask=str(folder / path_map(cells["mask"])) if cells["mask"] else "",
        mask_as_given=cells["mask"],
        label=cells["label"],
        split=cells["split"],
        process=cells["process"].lower() in _YES,
    )
