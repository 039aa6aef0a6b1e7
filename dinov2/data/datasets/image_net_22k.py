"""ImageNet-22k as one tar archive per class, read in place by byte offsets."""

import gzip
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from dinov2.data.datasets.arrays import IndexArray, save_array
from dinov2.data.datasets.checks import existing_folder
from dinov2.data.datasets.extended import ExtendedVisionDataset
from dinov2.data.datasets.process_cache import OpenFile, ProcessCache
from dinov2.data.datasets.tar_index import BLOCK_BYTES, tar_members
from dinov2.errors import DatasetError

GZIP_MAGIC = b"\x1f\x8b"
UNREADABLE_IMAGES = frozenset({"n06470073_47249.JPEG"})  # broken in the distribution
_Row = tuple[int, str, int, int, str]  # class number, class id, first and end byte, file name


class ImageNet22k(ExtendedVisionDataset):
    """ImageNet-22k from ``root/<class_id>.tar``.

    Args:
        root: folder of the archives.
        extra: folder of the index that :meth:`dump_extra` writes.
        transforms, transform, target_transform: as for torchvision's datasets.
        mmap_cache_size: archives kept open per process.

    Raises:
        DatasetError: a folder is missing; at first use: the index is missing.
    """

    def __init__(
        self,
        *,
        root: str,
        extra: str,
        transforms: Callable | None = None,
        transform: Callable | None = None,
        target_transform: Callable | None = None,
        mmap_cache_size: int = 16,
    ) -> None:
        existing_folder(root, dataset="ImageNet22k", key="root")
        super().__init__(root, transforms, transform, target_transform)
        build = "call ImageNet22k(root=..., extra=...).dump_extra() once"
        self._entries = IndexArray(str(Path(extra, "entries.npy")), build)
        self._class_ids = IndexArray(str(Path(extra, "class-ids.npy")), build)
        self._archives = ProcessCache(mmap_cache_size)

    def __len__(self) -> int:
        return len(self._entries.get())

    def get_image_path(self, index: int) -> str:
        """Return the archive and the name of an image within it."""
        entry = self._entries.get()[index]
        return f"{self._archive_path(str(entry['class_id']))}:{entry['filename']}"

    def get_image_data(self, index: int) -> bytes:
        """Return the encoded image of a sample; some are stored compressed."""
        entry = self._entries.get()[index]
        archive = self._archives.get(self._archive_path(str(entry["class_id"])), OpenFile)
        begin, end = int(entry["start_offset"]) + BLOCK_BYTES, int(entry["end_offset"])
        data = archive.read(begin, end - begin)
        return gzip.decompress(data) if data.startswith(GZIP_MAGIC) else data

    def get_target(self, index: int) -> int:
        """Return the class number of a sample."""
        return int(self._entries.get()[index]["class_index"])

    def get_targets(self) -> np.ndarray:
        """Return the class numbers of all samples."""
        return self._entries.get()["class_index"]

    def get_class_id(self, index: int) -> str:
        """Return the class id of a sample."""
        return str(self._entries.get()[index]["class_id"])

    def get_class_ids(self) -> np.ndarray:
        """Return the class ids of all samples."""
        return self._entries.get()["class_id"]

    def find_class_id(self, class_index: int) -> str:
        """Return the class id with a number."""
        return str(self._class_ids.get()[class_index])

    def _archive_path(self, class_id: str) -> str:
        return str(Path(self.root, f"{class_id}.tar"))

    def dump_extra(self) -> None:
        """Read the headers of all archives and write the index; replaces an earlier one.

        Raises:
            DatasetError: there are no archives, or one is too large for the 32-bit offsets of the index.
            OutputError: the extra folder can not be written.
        """
        archives = sorted(Path(self.root).glob("*.tar"))
        rows = [row for number, path in enumerate(archives) for row in _tar_rows(number, path)]
        if not rows:
            raise DatasetError(f'ImageNet22k finds no archive with images in "{self.root}"')
        id_width, name_width = (max(len(row[column]) for row in rows) for column in (1, 4))
        dtype = [
            ("class_index", "<u4"),
            ("class_id", f"U{id_width}"),
            ("start_offset", "<u4"),
            ("end_offset", "<u4"),
            ("filename", f"U{name_width}"),
        ]
        save_array(self._entries.path, np.array(rows, dtype=dtype))
        save_array(self._class_ids.path, np.array([path.stem for path in archives]))
        self._entries.drop()
        self._class_ids.drop()


def _tar_rows(class_index: int, path: Path) -> Iterator[_Row]:
    for member in tar_members(path):
        if member.name in UNREADABLE_IMAGES:
            continue
        end = member.offset + member.size
        if end > np.iinfo(np.uint32).max:
            raise DatasetError(f'"{path}" has more than the 4 GiB that the index can address: split it')
        yield class_index, path.stem, member.offset - BLOCK_BYTES, end, member.name
