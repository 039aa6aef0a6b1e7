"""ImageNet-22k as one tar archive per class, read in place by byte offsets."""

import gzip
import mmap
import tarfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from dinov2.data.datasets.arrays import IndexArray, save_array
from dinov2.data.datasets.checks import existing_folder
from dinov2.data.datasets.extended import ExtendedVisionDataset
from dinov2.errors import DatasetError

TAR_HEADER_BYTES = 512
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
        self._mmap_cache_size = mmap_cache_size
        self._archives: OrderedDict[str, mmap.mmap] = OrderedDict()

    def __getstate__(self) -> dict:
        # Open archives stay in the process that opened them.
        return {**self.__dict__, "_archives": OrderedDict()}

    def __len__(self) -> int:
        return len(self._entries.get())

    def get_image_path(self, index: int) -> str:
        """Return the archive and the name of an image within it."""
        entry = self._entries.get()[index]
        return f"{self._archive_path(str(entry['class_id']))}:{entry['filename']}"

    def get_image_data(self, index: int) -> bytes:
        """Return the encoded image of a sample; some are stored compressed."""
        entry = self._entries.get()[index]
        archive = self._open_archive(str(entry["class_id"]))
        data = archive[int(entry["start_offset"]) + TAR_HEADER_BYTES : int(entry["end_offset"])]
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

    def _open_archive(self, class_id: str) -> mmap.mmap:
        """Return the archive of a class, the least recently used one making room."""
        if class_id not in self._archives:
            with Path(self._archive_path(class_id)).open("rb") as file:
                self._archives[class_id] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._archives.move_to_end(class_id)
        while len(self._archives) > self._mmap_cache_size:
            self._archives.popitem(last=False)[1].close()
        return self._archives[class_id]

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
    with tarfile.open(path) as archive:
        for member in archive:
            if not member.isfile() or member.name in UNREADABLE_IMAGES:
                continue
            end = member.offset_data + member.size
            if end > np.iinfo(np.uint32).max:
                raise DatasetError(f'"{path}" has more than the 4 GiB that the index can address: split it')
            yield class_index, path.stem, member.offset_data - TAR_HEADER_BYTES, end, member.name
