"""Images listed in a CSV file, optionally with labels and splits."""  # noqa: N999 - the forks' module name

import csv
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dinov2.data.datasets.arrays import PackedStrings
from dinov2.data.datasets.class_numbers import class_numbers
from dinov2.data.datasets.csv_text import csv_lines
from dinov2.data.datasets.extended import ExtendedVisionDataset
from dinov2.data.datasets.image_folder import IMAGE_SUFFIXES
from dinov2.data.datasets.path_map import PathMap, mapped_from
from dinov2.errors import DatasetError

logger = logging.getLogger("dinov2")


class CustomImageDataset(ExtendedVisionDataset):
    """Images listed in a CSV file with a header line.

    The first column holds the paths; relative ones are taken from ``root``. A column ``label`` gives
    targets: whole numbers are used as they are, names are numbered in the order of the alphabet over the
    whole file. A column ``split`` selects the lines of ``split``; without it all lines are used.

    Args:
        split: value to look for in the column ``split``, in capitals or not.
        root: folder of relative paths; empty means the folder of the CSV file.
        extra: path of the CSV file.
        transform: applied to each image.
        target_transform: applied to each target.
        test_size, random_state: accepted as in the forks, where they have no effect either.
        path_map: where recorded folders lie here, for the paths in the file; see
            :mod:`dinov2.data.datasets.path_map`.

    Raises:
        DatasetError: the file is missing or unusable, or its first image is missing.
    """

    def __init__(
        self,
        split: str = "TRAIN",
        root: str = "",
        extra: str = "",
        transform: Callable | None = None,
        target_transform: Callable | None = None,
        test_size: float = 0.2,
        random_state: int = 42,
        *,
        path_map: PathMap | str = "",
    ) -> None:
        if not extra or not Path(extra).is_file():
            raise DatasetError(
                f'CustomImageDataset needs a CSV file as extra, and "{extra}" is none: write extra=/path.csv'
            )
        root = root or str(Path(extra).parent)
        super().__init__(root, transform=transform, target_transform=target_transform)
        if (test_size, random_state) != (0.2, 42):
            logger.warning("test_size and random_state have no effect; use a column split in %s", extra)
        self._csv_path = extra
        header, rows = _read_rows(extra)
        if not rows:
            holds = f"only the line {','.join(header)}" if header else "nothing"
            raise DatasetError(
                f'"{extra}" holds {holds}: give it a header line, such as path, and one image a line below it'
            )
        self.how_to_label = f'give "{extra}" a column "label"' + (
            f" (its columns are {', '.join(header)})" if header else " and a header line"
        )
        labels, self.classes = _number_labels(_column(header, rows, "label"), extra)
        keep = _lines_of_split(_column(header, rows, "split"), split, extra, len(rows))
        self.path_map = PathMap.of(path_map)
        recorded = [rows[line][0] for line in keep]
        self._paths = PackedStrings(map(self.path_map, recorded) if self.path_map else recorded)
        self._targets = None if labels is None else labels[keep]
        if len(self) and not Path(self.get_image_path(0)).exists():
            raise DatasetError(
                f'the first image of "{extra}" is missing: there is no "{self.get_image_path(0)}"'
                f"{mapped_from(recorded[0], self._paths[0])}; relative paths are taken from root"
                + (", and commas separate columns" if set(recorded[0]) & set(";\t") else "")
            )

    def __len__(self) -> int:
        return len(self._paths)

    def get_image_path(self, index: int) -> str:
        """Return the path of an image."""
        return str(Path(self.root, self._paths[index]))

    def get_image_data(self, index: int) -> bytes:
        """Return the encoded image of a sample."""
        return Path(self.get_image_path(index)).read_bytes()

    def get_target(self, index: int) -> int | None:
        """Return the label of a sample, None without a column ``label``."""
        return None if self._targets is None else int(self._targets[index])

    def get_targets(self) -> np.ndarray:
        """Return the labels of all samples, int64.

        Raises:
            DatasetError: the file has no column ``label``.
        """
        if self._targets is None:
            raise DatasetError(f'"{self._csv_path}" has no labels: add a column label to evaluate with it')
        return self._targets


def _read_rows(path: str) -> tuple[list[str], list[list[str]]]:
    """Return the header (lower case) and the other lines that are not blank."""
    with csv_lines(path) as lines:
        rows = [row for row in csv.reader(lines) if row and row[0].strip()]
    if rows and rows[0][0].lower().endswith(IMAGE_SUFFIXES):
        logger.warning('"%s" has no header line; its first line is taken as an image', path)
        return [], rows
    return [name.strip().lower() for name in rows[0]] if rows else [], rows[1:]


def _column(header: list[str], rows: list[list[str]], name: str) -> list[str] | None:
    """Return a column behind the first, None if there is none of that name."""
    if name not in header[1:]:
        return None
    place = header.index(name, 1)
    return [row[place].strip() if place < len(row) else "" for row in rows]


def _number_labels(labels: list[str] | None, path: str) -> tuple[np.ndarray | None, list[str] | None]:
    """Return the labels as numbers, and the class names if they were names."""
    if labels is None:
        return None, None
    if "" in labels:
        raise DatasetError(f'image {labels.index("") + 1} of "{path}" has no label: give every line one')
    numbers, classes = class_numbers(labels, f'"{path}"')
    return np.array([numbers[label] for label in labels], dtype=np.int64), classes


def _lines_of_split(splits: list[str] | None, split: str, path: str, count: int) -> list[int]:
    if splits is None:
        return list(range(count))
    lines = [line for line, value in enumerate(splits) if value.lower() == split.lower()]
    if not lines:
        raise DatasetError(f'no line of "{path}" is of the split "{split}"; it has {sorted(set(splits))}')
    return lines
