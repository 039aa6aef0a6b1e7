"""How closely the files of an index are looked at: not at all, their first bytes, or all pixels."""

import os
import warnings
from collections.abc import Callable
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from dinov2.data.datasets.decoders import ImageDataDecoder
from dinov2.errors import ImageReadError

LEVELS = ("none", "header", "decode")  # each includes those before it
EMPTY = "the file is empty"
NO_IMAGE = "the file is no image that Pillow knows"


class UnreadableError(Exception):
    """A file could not be read at all, which may be otherwise at the next try; the text is the reason."""


def covers(done: str, wanted: str) -> bool:
    """Return whether files that were verified at the level ``done`` need no other look for ``wanted``."""
    return LEVELS.index(done) >= LEVELS.index(wanted)


def check_file(path: str, level: str) -> str:
    """Return what is wrong with an image file, or an empty string.

    Args:
        path: the file.
        level: ``header`` opens the image and reads its size; ``decode`` reads it as training does.

    Raises:
        UnreadableError: the file is gone or the file system failed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large images; here they count as any other
            return _CHECKS[level](path)
    except UnidentifiedImageError:
        return NO_IMAGE
    except ImageReadError as error:  # of the decoder that training uses
        unknown = isinstance(error.__cause__, UnidentifiedImageError)
        return NO_IMAGE if unknown else f"the image is damaged ({error.reason})"
    except OSError as error:
        if error.errno is None:  # Pillow's own: the content is at fault, not the way to it
            return f"the image is damaged ({error})"
        raise UnreadableError(f"the file can not be read ({os.strerror(error.errno)})") from error
    except Exception as error:  # decoders fail on damaged content in many ways; each is the file's fault
        return f"the image is damaged ({type(error).__name__}: {error})"


def _check_header(path: str) -> str:
    with Path(path).open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return EMPTY
        with Image.open(file) as image:
            return "" if min(image.size) > 0 else "the image has no pixels"


def _check_pixels(path: str) -> str:
    data = Path(path).read_bytes()
    if not data:
        return EMPTY
    ImageDataDecoder(data).decode()
    return ""


_CHECKS: dict[str, Callable[[str], str]] = {"header": _check_header, "decode": _check_pixels}
