"""Images in one folder per class, and the colorectal tissue set NCT-CRC that is stored so."""

import logging
import os
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path

import numpy as np

from dinov2.data.datasets.arrays import PackedStrings
from dinov2.data.datasets.checks import existing_folder, member_of
from dinov2.data.datasets.extended import ExtendedVisionDataset
from dinov2.errors import DatasetError

logger = logging.getLogger("dinov2")

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp")


class ImageFolder(ExtendedVisionDataset):
    """Images under ``root/<class>/``, at any depth; the classes are numbered in the order of their names.

    Args:
        root: folder of the class folders.
        transforms, transform, target_transform: as for torchvision's datasets.

    Raises:
        DatasetError: the folder is missing or holds no class folder with images.
    """

    def __init__(
        self,
        *,
        root: str,
        transforms: Callable | None = None,
        transform: Callable | None = None,
        target_transform: Callable | None = None,
    ) -> None:
        existing_folder(root, dataset=type(self).__name__, key="root")
        super().__init__(root, transforms, transform, target_transform)
        self._open(root, self._class_names(root))

    def _open(self, folder: str, classes: list[str]) -> None:
        """List the images of every class."""
        images_by_class = [sorted(_images_below(os.path.join(folder, name))) for name in classes]  # noqa: PTH118
        self.classes = classes
        self._paths = PackedStrings(path for paths in images_by_class for path in paths)
        self._targets = np.repeat(np.arange(len(classes)), [len(paths) for paths in images_by_class])
        if not len(self._paths):
            raise DatasetError(
                f'{type(self).__name__} finds no image in "{folder}": put images '
                f"({', '.join(IMAGE_SUFFIXES)}) into one sub-folder per class"
            )
        empty = [name for name, paths in zip(classes, images_by_class, strict=True) if not paths]
        if empty:
            logger.warning('no images of %s in "%s"', ", ".join(empty), folder)

    @staticmethod
    def _class_names(folder: str) -> list[str]:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir() and entry.name[0] != ".")

    def __len__(self) -> int:
        return len(self._paths)

    def get_image_path(self, index: int) -> str:
        """Return the path of an image."""
        return self._paths[index]

    def get_image_data(self, index: int) -> bytes:
        """Return the encoded image of a sample."""
        return Path(self._paths[index]).read_bytes()

    def get_target(self, index: int) -> int:
        """Return the class number of a sample."""
        return int(self._targets[index])

    def get_targets(self) -> np.ndarray:
        """Return the class numbers of all samples, int64."""
        return self._targets


class NCTCRC(ImageFolder):
    """Nine kinds of colorectal tissue, 224 px at 0.5 um/px (Kather et al., doi 10.5281/zenodo.1214456).

    Args:
        split: ``TRAIN`` (NCT-CRC-HE-100K), ``VAL`` (CRC-VAL-HE-7K, other patients) or ``TRAIN_NONORM``
            (the 100K without colour normalisation).
        root: folder that holds the folders of the splits.
        transforms, transform, target_transform: as for torchvision's datasets.

    Raises:
        DatasetError: the split is unknown, or its folder is missing or empty.
    """

    CLASSES = ("ADI", "BACK", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM")

    class Split(Enum):
        """Name of the folder of each split."""

        TRAIN = "NCT-CRC-HE-100K"
        VAL = "CRC-VAL-HE-7K"
        TRAIN_NONORM = "NCT-CRC-HE-100K-NONORM"

    def __init__(
        self,
        *,
        split: "NCTCRC.Split | str",
        root: str,
        transforms: Callable | None = None,
        transform: Callable | None = None,
        target_transform: Callable | None = None,
    ) -> None:
        self.split = member_of(self.Split, split, dataset=type(self).__name__)
        super().__init__(
            root=root, transforms=transforms, transform=transform, target_transform=target_transform
        )

    def _class_names(self, folder: str) -> list[str]:
        return list(self.CLASSES)

    def _open(self, folder: str, classes: list[str]) -> None:
        split_folder = os.path.join(folder, self.split.value)  # noqa: PTH118
        if not os.path.isdir(split_folder):  # noqa: PTH112
            raise DatasetError(
                f'NCTCRC split {self.split.name} needs the folder "{split_folder}", which is missing: '
                f"unpack {self.split.value} into the root"
            )
        super()._open(split_folder, classes)


def _images_below(folder: str) -> Iterator[str]:
    """Yield the paths of the images in a folder and below it; nothing when it is missing."""
    for parent, _, names in os.walk(folder):
        for name in names:
            if name.lower().endswith(IMAGE_SUFFIXES) and name[0] != ".":
                yield os.path.join(parent, name)  # noqa: PTH118 - plain strings, there may be millions
