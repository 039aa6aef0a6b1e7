"""Tiles of many slides: ``<patches_path>/<slide>/<slide>_patch_<n>.jpeg`` (or jpg, png), listed by an index.

``root/entry.csv`` names the patches folders. The index is the forks' ``entries-TRAIN.npy`` (number of the
tile, of the slide within its folder, and of the folder, 12 bytes per tile), which says which slide it means
by its place in the sorted folder. So that a folder may change, ``dump_extra`` also records the slide names;
see :mod:`dinov2.data.datasets.tile_index`.
"""

import csv
import logging
import math
import os
from collections.abc import Callable
from enum import Enum
from pathlib import Path

from dinov2.data.datasets.arrays import IndexArray, PackedStrings
from dinov2.data.datasets.checks import existing_folder, member_of
from dinov2.data.datasets.csv_text import csv_lines
from dinov2.data.datasets.extended import ExtendedVisionDataset
from dinov2.data.datasets.path_map import SSHID_PATH_MAPS, PathMap
from dinov2.data.datasets.stale_index import warn_if_stale
from dinov2.data.datasets.tile_index import ENTRY_DTYPE, IndexFiles, SlideNames, read_slide_names
from dinov2.data.indexing.build import BuildReport, build_index
from dinov2.data.indexing.names import tile_name
from dinov2.errors import DatasetError

logger = logging.getLogger("dinov2")

CSV_COLUMN = "patches_path"


class _Split(Enum):
    TRAIN = "train"


class Pathology(ExtendedVisionDataset):
    """Tiles of many slides, without labels.

    Args:
        split: ``TRAIN``.
        root: folder of ``entry.csv``, whose column ``patches_path`` names the patches folders.
        extra: folder of the index that :meth:`dump_extra` writes.
        sshid: rewriting of the recorded paths as in the forks, ``11`` or ``448``; anything else leaves them.
        transforms, transform, target_transform: as for torchvision's datasets.
        path_map: where recorded folders lie here, ``/old=/new,/other=/elsewhere`` in a dataset string; asked
            before ``sshid``'s, see :mod:`dinov2.data.datasets.path_map`.

    Raises:
        DatasetError: ``entry.csv`` or a folder it names is missing; at first use: the index is missing or
            does not fit.
    """

    Split = _Split

    def __init__(
        self,
        *,
        split: "Pathology.Split | str",
        root: str,
        extra: str,
        sshid: str = "",
        transforms: Callable | None = None,
        transform: Callable | None = None,
        target_transform: Callable | None = None,
        path_map: PathMap | str = "",
    ) -> None:
        self._split = member_of(_Split, split, dataset="Pathology")
        existing_folder(root, dataset="Pathology", key="root")
        super().__init__(root, transforms, transform, target_transform)
        self.path_map = PathMap.of(path_map).or_else(SSHID_PATH_MAPS.get(str(sshid), PathMap()))
        # With the slash behind it a folder matches as it would within the path of a tile.
        recorded = read_entry_csv(Path(root, "entry.csv"))
        self._folders = [self.path_map(f"{path.rstrip('/')}/").rstrip("/") for path in recorded]
        for folder, path in zip(self._folders, recorded, strict=True):
            existing_folder(
                folder,
                dataset="Pathology",
                key=f"{CSV_COLUMN} in {root}/entry.csv",
                recorded=path.rstrip("/"),
            )
        build = f"build it with python -m dinov2.data.index --root {root} --extra {extra}"
        build += f" --sshid {sshid}" if sshid else ""
        build += f" --path-map {path_map}" if path_map and isinstance(path_map, str) else ""
        self._files = IndexFiles(extra, self._split.name)
        self._build = build
        self._entries = IndexArray(self._files.entries, build, ENTRY_DTYPE.names)
        self._slides: list[SlideNames] | None = None

    def __getstate__(self) -> dict:
        # A worker process reads the names itself, so that its start costs the same for any number of slides.
        return {**self.__dict__, "_slides": None}

    @property
    def split(self) -> _Split:
        """The split."""
        return self._split

    def __len__(self) -> int:
        count = len(self._entries.get())
        if count and self._slides is None:
            # Stray files left junk in the last rows of the forks' indices: better found now than in a run.
            self.get_image_path(count - 1)
            again = self._build.replace("build it", "build it again", 1)
            warn_if_stale(self._entries.path, count, self._slide_folder, again)
        return count

    def get_image_path(self, index: int) -> str:
        """Return the path of a tile.

        Raises:
            DatasetError: the index does not fit the folders.
        """
        entry = self._entries.get()[index]
        folder_number, slide_number = int(entry["dataset_index"]), int(entry["dir_index"])
        slides = self._slide_names()
        if folder_number >= len(slides) or slide_number >= len(slides[folder_number].names):
            raise DatasetError(
                f'tile {index} of "{self._entries.path}" is of slide {slide_number} in folder '
                f"{folder_number}, which does not exist: entry.csv or its folders have changed, or the index "
                "was written over stray files; build it again"
            )
        slide = slides[folder_number].names[slide_number]
        name = tile_name(slide, int(entry["actual_index"]), slides[folder_number].suffix(slide_number))
        return f"{self._folders[folder_number]}/{slide}/{name}"

    def _slide_folder(self, index: int) -> str:
        return self.get_image_path(index).rpartition("/")[0]

    def get_image_data(self, index: int) -> bytes:
        """Return the encoded image of a tile."""
        return Path(self.get_image_path(index)).read_bytes()

    def get_target(self, index: int) -> None:
        """Return None: tiles have no labels."""
        return

    def get_targets(self) -> None:
        """Refuse: tiles have no labels.

        Raises:
            DatasetError: always.
        """
        raise DatasetError(
            "Pathology has no labels: evaluate with NCTCRC, ImageFolder or a labelled CustomImageDataset"
        )

    def dump_extra(
        self, *, workers: int | None = None, verify: str = "none", fresh: bool = False
    ) -> BuildReport:
        """List the tiles in all patches folders and write the index; replaces an earlier one.

        Args:
            workers, verify, fresh: see :func:`~dinov2.data.indexing.build.build_index`.

        Raises:
            ConfigError, DatasetError, OutputError: as there.
        """
        report = build_index(self._folders, self._files, workers=workers, verify=verify, fresh=fresh)
        self._entries.drop()
        self._slides = None
        # The forks' rule of thumb: 100 epochs on four processes with 128 images are one pass, in steps of 50.
        suggestion = math.ceil(report.tiles // (128 * 4 * 100) / 50) * 50
        if suggestion:
            logger.debug(
                "for this number of tiles the forks would suggest train.OFFICIAL_EPOCH_LENGTH=%d", suggestion
            )
        return report

    def _slide_names(self) -> list[SlideNames]:
        """Sorted names in every patches folder, as recorded with the index or else as listed now, once."""
        if self._slides is None:
            recorded = read_slide_names(self._files, self._entries.get())
            self._entries.require_unchanged()  # or the names may be those of the next index
            if recorded is None:
                listed = [sorted(os.listdir(folder)) for folder in self._folders]  # noqa: PTH208
                recorded = [SlideNames(PackedStrings(names)) for names in listed]
            elif len(recorded) != len(self._folders):
                raise DatasetError(
                    f'"{self.root}/entry.csv" lists {len(self._folders)} folders, but the index '
                    f'"{self._entries.path}" was built over {len(recorded)}: build it again'
                )
            self._slides = recorded
        return self._slides


def read_entry_csv(path: Path) -> list[str]:
    """Return the patches folders that an ``entry.csv`` names.

    Raises:
        DatasetError: it is missing, no CSV file, lacks the column, or a line of it is empty.
    """
    if not path.is_file():
        raise DatasetError(
            f'Pathology needs "{path}", which is missing: write a CSV file with the column {CSV_COLUMN} and '
            "one patches folder a line"
        )
    with csv_lines(path, errors="surrogateescape") as lines:
        reader = csv.DictReader(lines)
        if CSV_COLUMN not in (reader.fieldnames or []):
            raise DatasetError(f'"{path}" has the columns {reader.fieldnames}, but {CSV_COLUMN} is needed')
        # The index names a folder by its line, so no line may be passed over.
        folders = [(row[CSV_COLUMN] or "").strip() for row in reader]
    if not folders:
        raise DatasetError(f'"{path}" lists no patches folder: add one line per folder below {CSV_COLUMN}')
    if "" in folders:
        raise DatasetError(
            f'line {folders.index("") + 2} of "{path}" has nothing below {CSV_COLUMN}: give a path'
        )
    return folders
