"""The two libraries that open slide files, behind one interface."""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from PIL import Image

from dinov2.errors import ConfigError, DatasetError, nearest

AUTO = "auto"
# tiffslide names the same facts with its own prefix.
_FOREIGN_PREFIX = "tiffslide."
_PREFIX = "openslide."


class Backend:
    """An open slide file.

    Attributes:
        name: of the library.
        properties: name -> text, by OpenSlide's names whatever the library.
        level_dimensions: (width, height) of each level, largest first.
        level_downsamples: level-0 pixels per pixel of each level.
    """

    name: str
    properties: dict[str, str]
    level_dimensions: tuple[tuple[int, int], ...]
    level_downsamples: tuple[float, ...]

    def read(self, x: int, y: int, level: int, size: tuple[int, int], background: str) -> Image.Image:
        """Return a region as RGB; what lies outside the picture has the background colour.

        Args:
            x, y: upper left corner in level-0 pixels.
            level: which level to read.
            size: (width, height) in pixels of that level.
            background: ``#rrggbb``.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Give the file back."""
        raise NotImplementedError


class OpenSlideBackend(Backend):
    """Reads by OpenSlide: the formats of all large scanner makers."""

    name = "openslide"

    def __init__(self, path: str) -> None:
        import openslide

        self._handle = openslide.OpenSlide(path)
        self.properties = dict(self._handle.properties)
        self.level_dimensions = self._handle.level_dimensions
        self.level_downsamples = self._handle.level_downsamples

    def read(self, x: int, y: int, level: int, size: tuple[int, int], background: str) -> Image.Image:
        """Return a region as RGB, see :class:`Backend`."""
        region = self._handle.read_region((x, y), level, size)
        alpha = region.getchannel("A")
        if alpha.getextrema() == (255, 255):
            return region.convert("RGB")
        picture = Image.new("RGB", size, background)
        picture.paste(region.convert("RGB"), mask=alpha)
        return picture

    def close(self) -> None:
        """Give the file back."""
        self._handle.close()


class TiffSlideBackend(Backend):
    """Reads by tiffslide: TIFF-based formats, in Python alone."""

    name = "tiffslide"

    def __init__(self, path: str) -> None:
        import tiffslide

        with _silent("tifffile"):
            self._handle = tiffslide.TiffSlide(path)
            self.properties = {
                _by_openslide(key): str(value)
                for key, value in self._handle.properties.items()
                if value not in (None, "")
            }
            self.level_dimensions = tuple((int(w), int(h)) for w, h in self._handle.level_dimensions)
            self.level_downsamples = tuple(float(factor) for factor in self._handle.level_downsamples)

    def read(self, x: int, y: int, level: int, size: tuple[int, int], background: str) -> Image.Image:
        """Return a region as RGB, see :class:`Backend`."""
        # tiffslide fills the outside with black, so only the inside is asked for.
        factor, (width, height) = self.level_downsamples[level], self.level_dimensions[level]
        left, top = round(x / factor), round(y / factor)
        inside = (max(left, 0), max(top, 0), min(left + size[0], width), min(top + size[1], height))
        if inside[0] >= inside[2] or inside[1] >= inside[3]:
            return Image.new("RGB", size, background)
        region = self._region(inside, level)
        if region.size == size:
            return region
        picture = Image.new("RGB", size, background)
        picture.paste(region, (inside[0] - left, inside[1] - top))
        return picture

    def _region(self, box: tuple[int, int, int, int], level: int) -> Image.Image:
        """Return a box in pixels of the level, all of it inside the picture."""
        # tiffslide takes level-0 pixels and rounds down to pixels of the level.
        factor = self.level_downsamples[level]
        corner = (math.ceil(box[0] * factor), math.ceil(box[1] * factor))
        return self._handle.read_region(corner, level, (box[2] - box[0], box[3] - box[1])).convert("RGB")

    def close(self) -> None:
        """Give the file back."""
        self._handle.close()


def _by_openslide(key: str) -> str:
    """Return OpenSlide's name of a property of tiffslide."""
    return key.replace(_FOREIGN_PREFIX, _PREFIX, 1) if key.startswith(_FOREIGN_PREFIX) else key


@contextmanager
def _silent(name: str) -> Iterator[None]:
    """Keep a library from logging of a damaged file, which the error that follows names."""
    log = logging.getLogger(name)
    log.addFilter(_nothing)
    try:
        yield
    finally:
        log.removeFilter(_nothing)


def _nothing(record: logging.LogRecord) -> bool:
    return False


_HOW_TO_INSTALL = {
    OpenSlideBackend.name: "is not installed: pip install -e '.[slides]'",
    TiffSlideBackend.name: "is not installed: pip install tiffslide",
}
BACKENDS: dict[str, Callable[[str], Backend]] = {
    OpenSlideBackend.name: OpenSlideBackend,
    TiffSlideBackend.name: TiffSlideBackend,
}


def check_backend(backend: str) -> None:
    """Refuse a backend that can not be used, before any slide is opened.

    Raises:
        ConfigError: there is no such backend, or its package is missing.
    """
    if backend != AUTO and backend not in BACKENDS:
        raise ConfigError(
            f'the slide backend is "{backend}"{nearest(backend, [AUTO, *BACKENDS])}; accepted are '
            f"{', '.join([AUTO, *BACKENDS])}"
        )
    if backend != AUTO and not _installed(backend):
        raise ConfigError(f"the slide backend {backend} {_HOW_TO_INSTALL[backend]}")


def _installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ValueError:  # taken out of this process by a None in sys.modules
        return False


def open_backend(path: str, backend: str) -> Backend:
    """Open a slide file by the library of that name, or by the first that can (``auto``).

    Raises:
        ConfigError: there is no such backend, or its package is missing.
        DatasetError: the file can not be opened; names the reason of each library.
    """
    check_backend(backend)
    if not Path(path).is_file():
        raise DatasetError(f'there is no slide file "{path}"')
    if not Path(path).stat().st_size:
        raise DatasetError(f'the slide file "{path}" is empty: copy it again, or take it off the list')
    reasons = []
    for name in BACKENDS if backend == AUTO else [backend]:
        try:
            return BACKENDS[name](path)
        except ImportError as error:
            if backend != AUTO:
                raise ConfigError(f"the slide backend {name} can not be loaded: {error}") from None
            reasons.append(f"{name} {_HOW_TO_INSTALL[name]}")
        except Exception as error:
            reasons.append(f"{name}: {reason_of(error)}")
    raise DatasetError(
        f'the slide "{path}" can not be opened ({"; ".join(reasons)}): it is damaged or no slide; copy it '
        "again, or take it off the list"
    )


def reason_of(error: Exception) -> str:
    """Return what a library says of a file, in one line."""
    return " ".join(str(error).split()) or type(error).__name__
