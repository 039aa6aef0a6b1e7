"""ImageNet-1k in the folder layout of the challenge, with an index in ``.npy`` files."""

import csv
import logging
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path

import numpy as np

from dinov2.data.datasets.arrays import IndexArray, save_array
from dinov2.data.datasets.checks import existing_folder, member_of
from dinov2.data.datasets.csv_text import csv_lines
from dinov2.data.datasets.extended import ExtendedVisionDataset
from dinov2.errors import DatasetError

logger = logging.getLogger("dinov2")

NO_CLASS = np.iinfo(np.uint32).max
_Row = tuple[int, int, str, str]  # number in the file name, class number, class id, class name


class _Split(Enum):
    TRAIN = "train"
    VAL = "val"
    TEST = "test"

    @property
    def length(self) -> int:
        """Images of the full split."""
        return {"train": 1_281_167, "val": 50_000, "test": 100_000}[self.value]

    def image_path(self, actual_index: int, class_id: str = "") -> str:
        """Return the path of an image below the root."""
        if self is _Split.TRAIN:
            return f"train/{class_id}/{class_id}_{actual_index}.JPEG"
        folder = f"val/{class_id}" if self is _Split.VAL else "test"
        return f"{folder}/ILSVRC2012_{self.value}_{actual_index:08d}.JPEG"


class ImageNet(ExtendedVisionDataset):
    """ImageNet-1k; subsets work too.

    Args:
        split: ``TRAIN``, ``VAL`` or ``TEST``.
        root: folder with ``labels.txt``, ``train``, ``val`` and ``test``.
        extra: folder of the index that :meth:`dump_extra` writes.
        transforms, transform, target_transform: as for torchvision's datasets.

    Raises:
        DatasetError: the split is unknown or a folder is missing; at first use: the index is missing.
    """

    Split = _Split

    def __init__(
        self,
        *,
        split: "ImageNet.Split | str",
        root: str,
        extra: str,
        transforms: Callable | None = None,
        transform: Callable | None = None,
        target_transform: Callable | None = None,
    ) -> None:
        self._split = member_of(_Split, split, dataset="ImageNet")
        existing_folder(root, dataset="ImageNet", key="root")
        super().__init__(root, transforms, transform, target_transform)
        self._extra = extra
        self._entries = self._index_array("entries")
        self._class_ids = self._index_array("class-ids")
        self._class_names = self._index_array("class-names")

    def _index_array(self, name: str) -> IndexArray:
        build = f"call ImageNet(split=ImageNet.Split.{self._split.name}, root=..., extra=...).dump_extra()"
        return IndexArray(str(Path(self._extra, f"{name}-{self._split.name}.npy")), f"{build} once")

    @property
    def split(self) -> _Split:
        """The split."""
        return self._split

    def __len__(self) -> int:
        return len(self._entries.get())

    def get_image_path(self, index: int) -> str:
        """Return the path of an image."""
        entry = self._entries.get()[index]
        return f"{self.root}/{self._split.image_path(int(entry['actual_index']), str(entry['class_id']))}"

    def get_image_data(self, index: int) -> bytes:
        """Return the encoded image of a sample."""
        return Path(self.get_image_path(index)).read_bytes()

    def get_target(self, index: int) -> int | None:
        """Return the class number of a sample, None in the test split."""
        return None if self._split is _Split.TEST else int(self._entries.get()[index]["class_index"])

    def get_targets(self) -> np.ndarray | None:
        """Return the class numbers of all samples, None in the test split."""
        return None if self._split is _Split.TEST else self._entries.get()["class_index"]

    def get_class_id(self, index: int) -> str | None:
        """Return the class id (WordNet) of a sample, None in the test split."""
        return None if self._split is _Split.TEST else str(self._entries.get()[index]["class_id"])

    def get_class_name(self, index: int) -> str | None:
        """Return the class name of a sample, None in the test split."""
        return None if self._split is _Split.TEST else str(self._entries.get()[index]["class_name"])

    def find_class_id(self, class_index: int) -> str:
        """Return the class id with a number."""
        return str(self._class_ids.get()[class_index])

    def find_class_name(self, class_index: int) -> str:
        """Return the class name with a number."""
        return str(self._class_names.get()[class_index])

    def dump_extra(self) -> None:
        """List the images below the root and write the index; replaces an earlier one.

        Raises:
            DatasetError: there are no images.
            OutputError: the extra folder can not be written.
        """
        rows = list(self._test_rows() if self._split is _Split.TEST else self._labelled_rows())
        if not rows:
            raise DatasetError(f'ImageNet finds no {self._split.name} image below "{self.root}"')
        if len(rows) != self._split.length:
            logger.warning(
                "ImageNet %s has %d images here, %d in full", self._split.name, len(rows), self._split.length
            )
        id_width, name_width = (max(1, *(len(row[column]) for row in rows)) for column in (2, 3))
        dtype = [
            ("actual_index", "<u4"),
            ("class_index", "<u4"),
            ("class_id", f"U{id_width}"),
            ("class_name", f"U{name_width}"),
        ]
        save_array(self._entries.path, np.array(rows, dtype=dtype))
        if self._split is not _Split.TEST:
            names = self._read_labels()
            class_ids = [folder.name for folder in self._class_folders()]
            save_array(self._class_ids.path, np.array(class_ids))
            save_array(self._class_names.path, np.array([names.get(item, item) for item in class_ids]))
        for array in (self._entries, self._class_ids, self._class_names):
            array.drop()

    def _class_folders(self) -> list[Path]:
        return sorted(path for path in Path(self.root, self._split.value).glob("*") if path.is_dir())

    def _labelled_rows(self) -> Iterator[_Row]:
        names = self._read_labels()
        for class_index, folder in enumerate(self._class_folders()):
            for path in sorted(folder.glob("*.JPEG")):
                yield _number_of(path), class_index, folder.name, names.get(folder.name, folder.name)

    def _test_rows(self) -> Iterator[_Row]:
        for path in sorted(Path(self.root, "test").glob("*.JPEG")):
            yield _number_of(path), NO_CLASS, "", ""

    def _read_labels(self) -> dict[str, str]:
        path = Path(self.root, "labels.txt")
        if not path.is_file():
            raise DatasetError(f'ImageNet needs "{path}" with lines class_id,class_name to name its classes')
        with csv_lines(path) as lines:
            return {row[0]: row[1] for row in csv.reader(lines) if len(row) > 1}


def _number_of(path: Path) -> int:
    """The number behind the last underscore of a file name."""
    digits = path.stem.rpartition("_")[2]
    if not digits.isdecimal():
        raise DatasetError(f'ImageNet can not index "{path}": its name should end in _ and a number')
    return int(digits)
