"""Whole-slide images read at any resolution, by OpenSlide or tiffslide."""

import threading
from typing import Any

from PIL import Image

from dinov2.data.slides.backends import AUTO, Backend, open_backend, reason_of
from dinov2.data.slides.forks import close_before_fork
from dinov2.data.slides.jpeg_tiles import with_jpeg_tiles
from dinov2.data.slides.resolution import find_mpp
from dinov2.errors import ConfigError, DatasetError, ImageReadError, UserError

# A level whose resolution differs by less is read as it is: resampling would only blur.
LEVEL_TOLERANCE = 0.05
WHITE = "#ffffff"
# Large regions are reduced in blocks of about this side, so that no level is held whole.
_BLOCK_SIDE = 4096


def open_slide(
    path: str, *, mpp: float | None = None, backend: str = AUTO, assumed_mpp: float | None = None
) -> "Slide":
    """Open a whole-slide image.

    Args:
        path: the slide file.
        mpp: um per level-0 pixel where the file says nothing or something wrong; it wins over the file.
        backend: ``openslide``, ``tiffslide``, or ``auto`` for the first that opens the file.
        assumed_mpp: um per level-0 pixel where neither the file nor ``mpp`` says anything.

    Raises:
        ConfigError: there is no such backend, or its package is missing.
        DatasetError: the file can not be opened, or the size of its pixels is not known.
    """
    return Slide(path, mpp=mpp, backend=backend, assumed_mpp=assumed_mpp)


class Slide:
    """A whole-slide image. Locations are always level-0 pixels from the upper left corner of the file.

    The file opens at the first read in every process, and is closed before a process forks: slides may be
    handed to worker processes of any kind. Threads take turns in reading; give each its own slide.

    Args:
        path, mpp, backend, assumed_mpp: see :func:`open_slide`.

    Attributes:
        path: of the file.
        dimensions: (width, height) of level 0.
        mpp: um per level-0 pixel.
        mpp_source: the rule that gave it, see :func:`~dinov2.data.slides.resolution.find_mpp`.
        bounds: (x, y, width, height) of the scanned area, the whole of level 0 unless the file names one.
        level_dimensions: (width, height) of each level.
        level_downsamples: level-0 pixels per pixel of each level.
        background: colour of what was not scanned, ``#rrggbb``.
        backend: the library in use.
        properties: all entries of the file, by OpenSlide's names.
    """

    def __init__(
        self,
        path: str,
        *,
        mpp: float | None = None,
        backend: str = AUTO,
        assumed_mpp: float | None = None,
    ) -> None:
        self.path = str(path)
        self.lock = threading.RLock()
        self._handle: Backend | None = None
        self._closes_by_itself = False
        self.backend = backend
        handle = self._opened()
        self.backend = handle.name
        try:
            self.properties = handle.properties
            self.level_dimensions = handle.level_dimensions
            self.level_downsamples = handle.level_downsamples
            self.dimensions = self.level_dimensions[0]
            self.mpp, self.mpp_source = find_mpp(
                self.properties, override=mpp, assumed=assumed_mpp, path=self.path
            )
            self.bounds = self._read_bounds()
        except Exception:
            self.close()
            raise
        self.background = f"#{self.properties.get('openslide.background-color', WHITE[1:])}"

    def read(self, x: int, y: int, size: int | tuple[int, int], mpp: float) -> Image.Image:
        """Return a tile as RGB; what lies outside the scanned area has the background colour.

        The tile covers ``size * downsample(mpp)`` level-0 pixels. It is read from the coarsest level that
        is fine enough, and averaged down from there if that level is finer than wanted.

        Args:
            x, y: upper left corner in level-0 pixels.
            size: pixels of the result, (width, height) or one number for both.
            mpp: resolution of the result in um per pixel.

        Raises:
            DatasetError: the slide is coarser than ``mpp``.
            ImageReadError: the region can not be read or decoded; names slide and location.
        """
        return self._resampled(int(x), int(y), _pair(size), self.downsample(mpp))

    def thumbnail(self, mpp: float | None = None, *, max_side: int | None = None) -> Image.Image:
        """Return the whole slide as one small RGB picture.

        Args:
            mpp: its resolution in um per pixel; or
            max_side: its longer side in pixels, at most that of level 0.

        Raises:
            ConfigError: both are given, or neither.
            DatasetError: the slide is coarser than ``mpp``.
            ImageReadError: the slide can not be read.
        """
        if (mpp is None) == (max_side is None):
            raise ConfigError("a thumbnail takes either its mpp or its max_side; give one of them")
        factor = max(1.0, max(self.dimensions) / max_side) if mpp is None else self.downsample(mpp)
        width, height = (max(1, round(side / factor)) for side in self.dimensions)
        return self._resampled(0, 0, (width, height), factor)

    def downsample(self, mpp: float) -> float:
        """Return the level-0 pixels per pixel of a result at that resolution.

        It is ``mpp / self.mpp``, or that of a level which differs by less than 5 %.

        Raises:
            DatasetError: level 0 is coarser than ``mpp``.
        """
        wanted = mpp / self.mpp
        nearest = min(self.level_downsamples, key=lambda factor: abs(wanted / factor - 1))
        if abs(wanted / nearest - 1) <= LEVEL_TOLERANCE:
            return nearest
        if wanted < 1:
            raise DatasetError(
                f'the slide "{self.path}" has {self.mpp:g} um per pixel ({self.mpp_source}) and nothing '
                f"finer, but {mpp:g} um are asked for: ask for {self.mpp:g} or more"
            )
        return wanted

    def level_for(self, factor: float) -> int:
        """Return the coarsest level that is fine enough for ``factor`` level-0 pixels per pixel."""
        fine_enough = [i for i, down in enumerate(self.level_downsamples) if down <= factor * (1 + 1e-6)]
        return max(fine_enough, key=self.level_downsamples.__getitem__, default=0)

    def patch_size_level0(self, size: int, mpp: float) -> int:
        """Return the side of a tile of ``size`` pixels at ``mpp`` in level-0 pixels."""
        return round(size * self.downsample(mpp))

    def close(self) -> None:
        """Close the file; the next read opens it again."""
        with self.lock:
            handle, self._handle = self._handle, None
            if handle is not None:
                handle.close()

    def __enter__(self) -> "Slide":
        return self

    def __exit__(self, *details: object) -> None:
        self.close()

    def __repr__(self) -> str:
        width, height = self.dimensions
        return f'Slide("{self.path}", {width} x {height} px of {self.mpp:g} um, {self.backend})'

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None, "lock": None, "_closes_by_itself": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, lock=threading.RLock())

    def _opened(self) -> Backend:
        if not self._closes_by_itself:
            close_before_fork(self)
            self._closes_by_itself = True
        if self._handle is None:
            self._handle = with_jpeg_tiles(open_backend(self.path, self.backend), self.path)
        return self._handle

    def _read_bounds(self) -> tuple[int, int, int, int]:
        keys = [f"openslide.bounds-{name}" for name in ("x", "y", "width", "height")]
        if not all(key in self.properties for key in keys):
            return (0, 0, *self.dimensions)
        x, y, width, height = (int(float(self.properties[key])) for key in keys)
        return x, y, width, height

    def _resampled(self, x: int, y: int, size: tuple[int, int], factor: float) -> Image.Image:
        """Return ``size`` pixels, each of ``factor`` level-0 pixels a side."""
        level = self.level_for(factor)
        ratio = factor / self.level_downsamples[level]
        stored = tuple(max(1, round(side * ratio)) for side in size)
        # Whole pixels are averaged first, which is exact; the rest of the ratio, below 2, by a filter.
        whole = max(1, int(ratio * (1 + 1e-6)))
        reduced = self._reduced(x, y, level, stored, whole)
        if reduced.size == size:
            return reduced
        box = (0, 0, stored[0] / whole, stored[1] / whole)
        return reduced.resize(size, Image.Resampling.HAMMING, box=box)

    def _reduced(self, x: int, y: int, level: int, stored: tuple[int, int], whole: int) -> Image.Image:
        """Return ``stored`` pixels of a level, averaged over ``whole`` x ``whole`` of them."""
        side = max(1, _BLOCK_SIDE // whole) * whole
        if max(stored) <= side:
            return _average(self._region(x, y, level, stored), whole)
        picture = Image.new("RGB", tuple(-(-length // whole) for length in stored))
        down = self.level_downsamples[level]
        for top in range(0, stored[1], side):
            for left in range(0, stored[0], side):
                part = (min(side, stored[0] - left), min(side, stored[1] - top))
                block = self._region(x + round(left * down), y + round(top * down), level, part)
                picture.paste(_average(block, whole), (left // whole, top // whole))
        return picture

    def _region(self, x: int, y: int, level: int, size: tuple[int, int]) -> Image.Image:
        with self.lock:
            try:
                return self._opened().read(x, y, level, size, self.background)
            except UserError as error:
                raise ImageReadError(str(error)) from error
            except Exception as error:
                # OpenSlide refuses every further read of a handle that has failed once.
                self.close()
                raise ImageReadError(
                    f'can not read the slide "{self.path}" at x={x}, y={y}, {size[0]} x {size[1]} pixels of '
                    f"level {level} ({reason_of(error)}): if the file is damaged, copy it again, or take it "
                    "off the list"
                ) from error


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    width, height = size if isinstance(size, tuple) else (size, size)
    return int(width), int(height)


def _average(picture: Image.Image, whole: int) -> Image.Image:
    return picture if whole == 1 else picture.reduce(whole)
