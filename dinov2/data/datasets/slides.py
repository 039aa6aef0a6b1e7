"""Tiles read from whole-slide images as they are drawn, without cutting them to files first."""

import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from dinov2.data.datasets.checks import existing_folder
from dinov2.data.datasets.decoders import Decoder
from dinov2.data.datasets.extended import ExtendedVisionDataset
from dinov2.data.datasets.path_map import PathMap
from dinov2.data.slides.coordinate_files import with_coordinate_files
from dinov2.data.slides.pool import SlidePool
from dinov2.data.slides.slide_tiles import TileSpec
from dinov2.data.slides.sources import SlideSource, slides_of_folder, slides_of_manifest
from dinov2.data.slides.tile_table import NO_LABEL, SlideRow, open_tile_table
from dinov2.errors import DatasetError, ImageReadError, UserError, nearest

BALANCES = ("slide", "tile")


class PixmapDecoder(Decoder):
    """Decodes the uncompressed pixmap (PPM) that :meth:`Slides.get_image_data` returns."""

    def decode(self) -> Image.Image:
        """Return the RGB image."""
        _, width, height, rest = self._stored.split(b" ", 3)
        return Image.frombytes("RGB", (int(width), int(height)), rest[rest.index(b"\n") + 1 :])


class Slides(ExtendedVisionDataset):
    """Tiles of whole-slide images at one resolution, read through OpenSlide or tiffslide when drawn.

    The corners of the tiles with tissue are found once, and kept in ``extra``. A sample is a fixed tile: the
    same in every pass, process and run with the same slides and options.

    With ``balance=slide`` every slide gives the same number of samples, so that each is drawn as often as any
    other: sample ``i`` belongs to slide ``i // m``, where ``m`` is ``tiles_per_slide``, or else the largest
    number of tiles of a slide. Slides with fewer tiles give theirs over and over. With ``balance=tile``
    every tile is one sample; ``tiles_per_slide`` then is the most that a slide gives. Where fewer tiles are
    wanted than a slide has, those used are spread evenly over it.

    Args:
        root: folder of the slides; relative paths of the manifest start here.
        pattern: names or globs below ``root``, separated by commas; empty means all slide formats.
        manifest: CSV of slides in place of ``pattern``: a column ``path`` (or ``slide``), and optionally
            ``mpp`` (um per level-0 pixel, wins over the file), ``label``, ``split``, ``mask``, ``process`` (0
            leaves the slide out).
        split: which lines of the manifest to take; empty means all.
        size: side of a tile in pixels.
        mpp: um per pixel of a tile.
        overlap: pixels that neighbouring tiles share; negative for a gap between them.
        min_tissue: share of a tile that has to be tissue, 0 to 1.
        balance: ``slide`` or ``tile``.
        tiles_per_slide: see above; 0 means all.
        extra: folder where corners are kept; empty means ``$DINOV2_CACHE/slides``, by default
            ``~/.cache/dinov2/slides``.
        coords: folder of HDF5 files with corners (CLAM, TRIDENT) that replace grid and tissue.
        backend: ``openslide``, ``tiffslide``, or ``auto`` for the first that opens a slide.
        random_offset: every draw is moved by up to this many pixels in x and y, within the scanned area.
        open_slides: slides that a process holds open at a time.
        path_map: where recorded folders lie here, for the paths in the manifest; see
            :mod:`dinov2.data.datasets.path_map`.
        transforms, transform, target_transform: as for torchvision's datasets.

    Attributes:
        classes: names of the labels, empty if they are numbers or missing.

    Raises:
        DatasetError: there are no slides, or none gives a tile.
        ConfigError: an option is out of its range.
    """

    def __init__(
        self,
        *,
        root: str = "",
        pattern: str = "",
        manifest: str = "",
        split: str = "",
        size: int = 224,
        mpp: float = 0.5,
        overlap: int = 0,
        min_tissue: float = 0.25,
        balance: str = "slide",
        tiles_per_slide: int = 0,
        extra: str = "",
        coords: str = "",
        backend: str = "auto",
        random_offset: int = 0,
        open_slides: int = 16,
        path_map: PathMap | str = "",
        transforms: Callable | None = None,
        transform: Callable | None = None,
        target_transform: Callable | None = None,
    ) -> None:
        super().__init__(root, transforms, transform, target_transform, image_decoder=PixmapDecoder)
        if balance not in BALANCES:
            raise DatasetError(
                f'the balance of Slides is "{balance}"{nearest(balance, BALANCES)}; accepted: slide, tile'
            )
        for key, value, least in (
            ("tiles_per_slide", tiles_per_slide, 0),
            ("random_offset", random_offset, 0),
            ("open_slides", open_slides, 1),
        ):
            if value < least:
                raise DatasetError(f"the {key} of Slides is {value}; it takes {least} or more")
        spec = TileSpec(size, mpp, overlap, min_tissue, backend)
        sources, self.classes = _find_sources(root, pattern, manifest, split, PathMap.of(path_map))
        if coords:
            sources = with_coordinate_files(sources, existing_folder(coords, dataset="Slides", key="coords"))
        self._table = open_tile_table(sources, spec, extra or _default_folder())
        self._pool = SlidePool(open_slides, backend)
        what = f'give "{manifest}"' if manifest else "give a CSV file as manifest=, with a column path and"
        self.how_to_label = f'{what} a column "label"'
        self._size, self._balance, self._random_offset = size, balance, random_offset
        self._per_slide = tiles_per_slide
        if balance == "slide" and not tiles_per_slide:
            self._per_slide = int(self._table.counts.max())
        self._ends: np.ndarray | None = None
        self._length = int(self._sample_ends()[-1])

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_ends": None}  # made again from the memory map

    def __len__(self) -> int:
        return self._length

    def locate(self, index: int) -> tuple[SlideRow, int, int]:
        """Return the slide of a sample and the corner of its tile in level-0 pixels."""
        slide, tile = self._slide_and_tile(index)
        return (self._table.slide(slide), *self._table.corner(slide, tile))

    def get_image(self, index: int) -> Image.Image:
        """Return the tile of a sample as RGB.

        Raises:
            ImageReadError: it can not be read.
        """
        row, x, y = self.locate(index)
        try:
            slide = self._pool.get(row.path, row.mpp)
        except UserError as error:
            raise ImageReadError(str(error)) from error
        if self._random_offset:
            x, y = self._moved(x, y, slide.bounds, row.side)
        return slide.read(x, y, self._size, row.side / self._size * slide.mpp)

    def get_image_data(self, index: int) -> bytes:
        """Return the tile of a sample as an uncompressed pixmap, a file that any program opens.

        Raises:
            ImageReadError: it can not be read.
        """
        image = self.get_image(index)
        return b"P6 %d %d 255\n" % image.size + image.tobytes()

    def get_image_path(self, index: int) -> str:
        """Return slide and place of a sample, for messages."""
        row, x, y = self.locate(index)
        return f"{row.path} at x={x}, y={y}"

    def get_target(self, index: int) -> int | None:
        """Return the label of a sample's slide, None without labels."""
        return self._table.slide(self._slide_and_tile(index)[0]).label

    def get_targets(self) -> np.ndarray:
        """Return the labels of all samples, int64.

        Raises:
            DatasetError: the slides have no labels.
        """
        labels = self._table.labels
        if (labels == NO_LABEL).any():
            raise DatasetError("Slides has no labels: give a manifest with the column label")
        return np.repeat(labels, np.diff(self._sample_ends(), prepend=0))

    def _sample_ends(self) -> np.ndarray:
        """Number of samples up to and with each slide."""
        if self._ends is None:
            counts = self._table.counts
            if self._balance == "slide":
                counts = np.full(len(counts), self._per_slide)
            elif self._per_slide:
                counts = np.minimum(counts, self._per_slide)
            self._ends = np.cumsum(counts)
        return self._ends

    def _slide_and_tile(self, index: int) -> tuple[int, int]:
        index = range(self._length)[index]
        ends = self._sample_ends()
        slide = int(np.searchsorted(ends, index, side="right"))
        draw = index - (int(ends[slide - 1]) if slide else 0)
        count = int(self._table.counts[slide])
        if 0 < self._per_slide < count:
            return slide, draw * count // self._per_slide
        return slide, draw % count

    def _moved(self, x: int, y: int, bounds: tuple[int, int, int, int], side: float) -> tuple[int, int]:
        reach = self._random_offset * side / self._size
        moved = []
        for place, start, length in zip((x, y), bounds[:2], bounds[2:], strict=True):
            low, high = max(start, place - reach), min(start + length - side, place + reach)
            moved.append(round(random.uniform(low, high)) if low < high else place)
        return moved[0], moved[1]


def _find_sources(
    root: str, pattern: str, manifest: str, split: str, path_map: PathMap
) -> tuple[list[SlideSource], list[str]]:
    if manifest:
        if pattern:
            raise DatasetError("Slides takes its slides from pattern or from manifest; leave one of them out")
        return slides_of_manifest(manifest, root=root, split=split, path_map=path_map)
    if split:
        raise DatasetError(f"Slides has a split, {split}, but no manifest with a column split; give one")
    return slides_of_folder(existing_folder(root, dataset="Slides", key="root"), pattern), []


def _default_folder() -> str:
    cache = os.environ.get("DINOV2_CACHE") or Path.home() / ".cache" / "dinov2"
    return str(Path(cache).expanduser() / "slides")
