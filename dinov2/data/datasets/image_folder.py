"""Images in one folder per class, and the colorectal tissue set NCT-CRC that is stored so."""

import logging
import os
from collections.abc import Callable, Iterator, Set
from enum import Enum
from pathlib import Path

import numpy as np

from dinov2.data.datasets.arrays import PackedStrings
from dinov2.data.datasets.checks import existing_folder, member_of
from dinov2.data.datasets.extended import ExtendedVisionDataset
from dinov2.data.datasets.folders import Place, folders_below, is_folder, place_of
from dinov2.errors import DatasetError

logger = logging.getLogger("dinov2")

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp")


class ImageFolder(ExtendedVisionDataset):
    """Images under ``root/<class>/``, at any depth; the classes are numbered in the order of their names.

    Links to folders are followed; files and folders whose names begin with a dot are passed over.

    Args:
        root: folder of the class folders.
        labels: ``folders`` takes the folders in the root as classes; ``none`` takes all images in the root
            and below, however they are sorted into folders, without labels.
        transforms, transform, target_transform: as for torchvision's datasets.

    Raises:
        DatasetError: the folder is missing or holds no image, or none in a class folder.
    """

    classes: list[str] | None

    def __init__(
        self,
        *,
        root: str,
        labels: str = "folders",
        transforms: Callable | None = None,
        transform: Callable | None = None,
        target_transform: Callable | None = None,
    ) -> None:
        existing_folder(root, dataset=type(self).__name__, key="root")
        if labels not in ("folders", "none"):
            raise DatasetError(f'labels of {type(self).__name__} is "{labels}"; it takes folders or none')
        super().__init__(root, transforms, transform, target_transform)
        if labels == "none":
            self._open_unlabelled(root)
        else:
            self._open(root, self._class_names(root))

    def _open_unlabelled(self, folder: str) -> None:
        """List all images, wherever they are."""
        self.classes, self._targets = None, None
        self._paths = PackedStrings(sorted(_images_below(folder)))
        if not len(self._paths):
            raise DatasetError(
                f'{type(self).__name__} finds no image ({", ".join(IMAGE_SUFFIXES)}) in "{folder}" or below: '
                "give another root"
            )

    def _open(self, folder: str, classes: list[str]) -> None:
        """List the images of every class."""
        images_by_class = [sorted(_images_below(f"{folder}/{name}", {place_of(folder)})) for name in classes]
        self.classes = classes
        self._paths = PackedStrings(path for paths in images_by_class for path in paths)
        self._targets = np.repeat(np.arange(len(classes)), [len(paths) for paths in images_by_class])
        if not len(self._paths):
            raise DatasetError(
                f'{type(self).__name__} finds no image in "{folder}": put images '
                f"({', '.join(IMAGE_SUFFIXES)}) into one sub-folder per class, or add labels=none to train "
                "on whatever lies there"
            )
        empty = [name for name, paths in zip(classes, images_by_class, strict=True) if not paths]
        if empty:
            logger.warning('no images of %s in "%s"', ", ".join(empty), folder)

    def _class_names(self, folder: str) -> list[str]:
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if entry.name[0] != "."]
            stray = sum(_is_image(entry.name) and not is_folder(entry) for entry in visible)
            names = sorted(entry.name for entry in visible if is_folder(entry))
        if stray and names:
            logger.warning(
                '%d images lie in "%s" itself, have no class and are left out; labels=none takes all images',
                *(stray, folder),
            )
        return names

    def __len__(self) -> int:
        return len(self._paths)

    def get_image_path(self, index: int) -> str:
        """Return the path of an image."""
        return self._paths[index]

    def get_image_data(self, index: int) -> bytes:
        """Return the encoded image of a sample."""
        return Path(self._paths[index]).read_bytes()

    def get_target(self, index: int) -> int | None:
        """Return the class number of a sample, None with ``labels=none``."""
        return None if self._targets is None else int(self._targets[index])

    def get_targets(self) -> np.ndarray:
        """Return the class numbers of all samples, int64.

        Raises:
            DatasetError: with ``labels=none``.
        """
        if self._targets is None:
            raise DatasetError(f'"{self.root}" was opened with labels=none: leave that out to have classes')
        return self._targets


class NCTCRC(ImageFolder):
    """Nine kinds of colorectal tissue, 224 px at 0.5 um/px (Kather et al., doi 10.5281/zenodo.1214456).

    A class that has not as many images as the published set is warned of.

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

    # Images of each class in the published sets.
    COUNTS_100K = (10407, 10566, 11512, 11557, 8896, 13536, 8763, 10446, 14317)
    COUNTS_7K = (1338, 847, 339, 634, 1035, 592, 741, 421, 1233)

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
            root = Path(folder).resolve()
            inside = root.name in {split.value for split in self.Split}
            raise DatasetError(
                f'NCTCRC split {self.split.name} needs the folder "{split_folder}", which is missing: '
                + (f"give root={root.parent}" if inside else f"unpack {self.split.value} into the root")
            )
        super()._open(split_folder, classes)
        published = self.COUNTS_7K if self.split is self.Split.VAL else self.COUNTS_100K
        found = np.bincount(self._targets, minlength=len(classes)).tolist()
        differing = [
            f"{name} {count} (not {expected})"
            for name, count, expected in zip(classes, found, published, strict=True)
            if count != expected
        ]
        if differing:
            logger.warning(
                '"%s" has not as many images as %s was published with: %s; scores on it are not '
                "comparable with others'",
                *(split_folder, self.split.value, ", ".join(differing)),
            )


def _images_below(folder: str, outside: Set[Place] = frozenset()) -> Iterator[str]:
    """Yield the paths of the images in a folder and below it, see :func:`folders_below`."""
    for parent, names in folders_below(folder, outside):
        yield from (f"{parent}/{name}" for name in names if _is_image(name))


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)
