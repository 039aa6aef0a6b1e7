"""Reads regions straight from the JPEG tiles of a TIFF slide, where the file is made of such.

OpenSlide decodes the same tiles, but composes a region through a general drawing library; for a tile of
224 px this takes several times as long as decoding. The pixels are the same.
"""

import contextlib
import itertools
import os
import struct
import threading
from collections import OrderedDict
from dataclasses import dataclass

from PIL import Image

from dinov2.data.slides import tiff_tags
from dinov2.data.slides.backends import Backend
from dinov2.data.slides.tiff_tags import Tag, read_directories

# Formats whose levels are plain TIFF directories; others overlap or shift their tiles. tiffslide names none.
_PLAIN_VENDORS = ("aperio", "generic-tiff", "")
_JPEG = 7
_COLOUR_TRANSFORMS = {2: 0, 6: 1}  # TIFF's photometric RGB and YCbCr -> the transform in Adobe's marker
_START, _END, _SCAN = b"\xff\xd8", b"\xff\xd9", 0xDA
CACHE_BYTES = 32 * 2**20


@dataclass(frozen=True)
class JpegLevel:
    """A level that is stored as JPEG tiles.

    Attributes:
        size: (width, height) of the level.
        tile: (width, height) of a stored tile.
        offsets, lengths: where each tile lies in the file.
        tables: quantisation and Huffman tables that all tiles share, a JPEG stream without its end.
        marker: tells the decoder how colours are stored.
    """

    size: tuple[int, int]
    tile: tuple[int, int]
    offsets: Tag
    lengths: Tag
    tables: bytes
    marker: bytes


class JpegTileBackend(Backend):
    """A slide of another backend, with its JPEG levels read directly.

    Args:
        inner: the open slide; reads the levels that are stored otherwise.
        descriptor: of its file, which this object closes.
        levels: level number -> where its tiles lie.
    """

    def __init__(self, inner: Backend, descriptor: int, levels: dict[int, JpegLevel]) -> None:
        self.name, self.properties = inner.name, inner.properties
        self.level_dimensions, self.level_downsamples = inner.level_dimensions, inner.level_downsamples
        self._inner, self._descriptor, self._levels = inner, descriptor, levels
        self._serial = next(_serials)  # tiles at hand are told apart by it

    def read(self, x: int, y: int, level: int, size: tuple[int, int], background: str) -> Image.Image:
        """Return a region as RGB, see :class:`Backend`; between pixels of a level the nearest is taken."""
        stored = self._levels.get(level)
        if stored is None:
            return self._inner.read(x, y, level, size, background)
        factor, (width, height) = self.level_downsamples[level], stored.size
        left, top = round(x / factor), round(y / factor)
        right, bottom = min(left + size[0], width), min(top + size[1], height)
        columns = range(max(left, 0) // stored.tile[0], -(-right // stored.tile[0]))
        rows = range(max(top, 0) // stored.tile[1], -(-bottom // stored.tile[1]))
        region = Image.new("RGB", size, background)
        for row in rows:
            for column in columns:
                tile = self._tile(level, stored, column, row)
                if tile is None:
                    return self._inner.read(x, y, level, size, background)
                region.paste(tile, (column * stored.tile[0] - left, row * stored.tile[1] - top))
        return region

    def close(self) -> None:
        """Give the file back."""
        self._inner.close()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        if getattr(self, "_descriptor", -1) >= 0:
            os.close(self._descriptor)

    def _tile(self, level: int, stored: JpegLevel, column: int, row: int) -> Image.Image | None:
        """Return a decoded tile, cut at the border of the level; None if the file leaves it out."""
        number = row * -(-stored.size[0] // stored.tile[0]) + column
        key = (self._serial, level, number)
        tile = _cache.get(key)
        if tile is None:
            length = stored.lengths[number]
            if not length:
                return None
            tile = _decode(os.pread(self._descriptor, length, stored.offsets[number]), stored)
            room = (stored.size[0] - column * stored.tile[0], stored.size[1] - row * stored.tile[1])
            if room[0] < tile.width or room[1] < tile.height:
                tile = tile.crop((0, 0, min(room[0], tile.width), min(room[1], tile.height)))
            _cache.put(key, tile)
        return tile


def with_jpeg_tiles(inner: Backend, path: str) -> Backend:
    """Return a backend that reads JPEG levels directly, or ``inner`` itself if the slide has none."""
    if inner.properties.get("openslide.vendor", "") not in _PLAIN_VENDORS:
        return inner
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    levels: dict[int, JpegLevel] = {}
    # A damaged file is for the library to judge.
    with contextlib.suppress(struct.error, IndexError):
        levels = _find_levels(descriptor, inner)
    if levels:
        return JpegTileBackend(inner, descriptor, levels)
    os.close(descriptor)
    return inner


def _find_levels(descriptor: int, inner: Backend) -> dict[int, JpegLevel]:
    """Match the levels of a slide with the directories of its file, by their sizes."""
    by_size: dict[tuple[int, int], list[dict[int, Tag]]] = {}
    for directory in read_directories(descriptor):
        if tiff_tags.WIDTH in directory and tiff_tags.HEIGHT in directory:
            size = (directory[tiff_tags.WIDTH][0], directory[tiff_tags.HEIGHT][0])
            by_size.setdefault(size, []).append(directory)
    levels = {}
    for number, size in enumerate(inner.level_dimensions):
        directories = by_size.get(tuple(size), [])
        # Several pictures of one size are planes or focus layers, of which the library picks one.
        level = _level_of(directories[0], tuple(size)) if len(directories) == 1 else None
        if level is not None:
            levels[number] = level
    return levels


def _level_of(tags: dict[int, Tag], size: tuple[int, int]) -> JpegLevel | None:
    """Return the level of a directory, None unless it is upright 8-bit RGB in JPEG tiles."""

    def value(number: int, default: int) -> int:
        return tags[number][0] if number in tags else default

    plain = (
        value(tiff_tags.COMPRESSION, 1) == _JPEG
        and value(tiff_tags.SAMPLES, 1) == 3
        and value(tiff_tags.PLANAR, 1) == 1
        and value(tiff_tags.ORIENTATION, 1) == 1
        and tiff_tags.BITS in tags
        and set(tags[tiff_tags.BITS].values()) == {8}
        and value(tiff_tags.PHOTOMETRIC, 0) in _COLOUR_TRANSFORMS
        and {tiff_tags.TILE_WIDTH, tiff_tags.TILE_HEIGHT} <= tags.keys()
        and {tiff_tags.TILE_OFFSETS, tiff_tags.TILE_BYTES} <= tags.keys()
    )
    if not plain:
        return None
    tile = (tags[tiff_tags.TILE_WIDTH][0], tags[tiff_tags.TILE_HEIGHT][0])
    count = -(-size[0] // tile[0]) * -(-size[1] // tile[1])
    offsets, lengths = tags[tiff_tags.TILE_OFFSETS], tags[tiff_tags.TILE_BYTES]
    if offsets.count != count or lengths.count != count:
        return None
    tables = tags[tiff_tags.JPEG_TABLES].values().tobytes() if tiff_tags.JPEG_TABLES in tags else _START
    transform = _COLOUR_TRANSFORMS[tags[tiff_tags.PHOTOMETRIC][0]]
    marker = struct.pack(">HH5sHHHB", 0xFFEE, 14, b"Adobe", 100, 0, 0, transform)
    return JpegLevel(size, tile, offsets, lengths, tables.removesuffix(_END), marker)


def _decode(data: bytes, level: JpegLevel) -> Image.Image:
    """Decode a stored tile: shared tables, its own headers, the colour marker last, its pixels."""
    if not data.startswith(_START):
        raise ValueError("a stored tile is no JPEG stream")
    scan = len(_START)
    while scan + 4 <= len(data) and data[scan + 1] != _SCAN:
        scan += 2 + struct.unpack_from(">H", data, scan + 2)[0]
    stream = b"".join((level.tables, data[len(_START) : scan], level.marker, data[scan:]))
    # Opening it as a file would parse the headers once more and copy the pixels, a third of the time. Streams
    # of another size, and such that end early, are refused.
    return Image.frombytes("RGB", level.tile, stream, "jpeg", "RGB", "")


class _TileCache:
    """The last decoded tiles of this process, of all slides together; a forked process starts with none."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget all tiles, and a lock that another thread held."""
        self._lock = threading.Lock()
        self._tiles: OrderedDict[tuple[int, int, int], Image.Image] = OrderedDict()
        self._bytes = 0

    def get(self, key: tuple[int, int, int]) -> Image.Image | None:
        """Return a tile, None if it is not at hand."""
        with self._lock:
            tile = self._tiles.get(key)
            if tile is not None:
                self._tiles.move_to_end(key)
            return tile

    def put(self, key: tuple[int, int, int], tile: Image.Image) -> None:
        """Keep a tile, and drop the longest unused ones."""
        with self._lock:
            self._tiles[key] = tile
            self._bytes += _bytes_of(tile)
            while self._bytes > CACHE_BYTES:
                self._bytes -= _bytes_of(self._tiles.popitem(last=False)[1])


def _bytes_of(tile: Image.Image) -> int:
    return 4 * tile.width * tile.height  # Pillow stores RGB in four bytes


_cache = _TileCache()


def forget_tiles() -> None:
    """Drop the decoded tiles that this process keeps."""
    _cache.clear()


os.register_at_fork(after_in_child=forget_tiles)
_serials = itertools.count()
