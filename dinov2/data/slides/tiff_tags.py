"""The few tags of TIFF and BigTIFF files that say where the tiles of a picture lie."""

import os
import struct
from typing import NamedTuple

import numpy as np

WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, ORIENTATION = 256, 257, 258, 259, 262, 274
SAMPLES, PLANAR, TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS, TILE_BYTES = 277, 284, 322, 323, 324, 325
JPEG_TABLES = 347

_WANTED = {
    *(WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, ORIENTATION),
    *(SAMPLES, PLANAR, TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS, TILE_BYTES, JPEG_TABLES),
}
_TYPES = {1: "u1", 3: "u2", 4: "u4", 7: "u1", 13: "u4", 16: "u8", 18: "u8"}
# More directories than any slide has: a damaged file that would be walked for ever.
_MAX_DIRECTORIES = 1000


class Tag(NamedTuple):
    """Where the values of a tag lie; they are read one by one, as a slide has up to a million tiles."""

    descriptor: int
    position: int
    dtype: np.dtype
    count: int

    def __getitem__(self, place: int) -> int:
        size = self.dtype.itemsize
        data = os.pread(self.descriptor, size, self.position + place * size)
        return int(np.frombuffer(data, self.dtype)[0])

    def values(self) -> np.ndarray:
        """Return all values."""
        size = self.dtype.itemsize * self.count
        return np.frombuffer(os.pread(self.descriptor, size, self.position), self.dtype)


def read_directories(descriptor: int) -> list[dict[int, Tag]]:
    """Return the wanted tags of each directory of an open TIFF file, none if it is no TIFF.

    Raises:
        struct.error: the file is cut off.
    """
    header = os.pread(descriptor, 16, 0)
    order = {b"II": "<", b"MM": ">"}.get(header[:2])
    version = struct.unpack(f"{order}H", header[2:4])[0] if order else 0
    if version not in (42, 43):
        return []
    # BigTIFF: 64-bit counts and offsets.
    entries_code, entry_size, offset_code = ("Q", 20, "Q") if version == 43 else ("H", 12, "I")
    (position,) = struct.unpack_from(f"{order}{offset_code}", header, 8 if version == 43 else 4)
    directories: list[dict[int, Tag]] = []
    seen = set()
    while position and position not in seen and len(directories) < _MAX_DIRECTORIES:
        seen.add(position)
        count_size = struct.calcsize(entries_code)
        (entries,) = struct.unpack(f"{order}{entries_code}", os.pread(descriptor, count_size, position))
        begin = position + count_size
        table = os.pread(descriptor, entries * entry_size, begin)
        tags = [
            _tag(descriptor, order, offset_code, table[start : start + entry_size], begin + start)
            for start in range(0, entries * entry_size, entry_size)
        ]
        directories.append({number: tag for number, tag in tags if number in _WANTED and tag})
        after = os.pread(descriptor, struct.calcsize(offset_code), begin + entries * entry_size)
        (position,) = struct.unpack(f"{order}{offset_code}", after)
    return directories


def _tag(descriptor: int, order: str, code: str, entry: bytes, position: int) -> tuple[int, Tag | None]:
    """Return number and tag of a directory entry that lies at ``position``."""
    number, kind, count = struct.unpack_from(f"{order}HH{code}", entry)
    if kind not in _TYPES:
        return number, None
    dtype = np.dtype(order + _TYPES[kind])
    field = 4 + struct.calcsize(code)  # short values stand in the entry itself, others where it points
    inline = dtype.itemsize * count <= struct.calcsize(code)
    place = position + field if inline else struct.unpack_from(f"{order}{code}", entry, field)[0]
    return number, Tag(descriptor, place, dtype, count)
