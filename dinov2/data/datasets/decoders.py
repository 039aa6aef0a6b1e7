"""From stored bytes and labels to what the transforms take; see docs/broken_input.md for damaged images."""

import logging
from io import BytesIO
from typing import Any

from PIL import Image, ImageFile, UnidentifiedImageError

from dinov2.data.datasets.pixels import to_rgb
from dinov2.errors import ImageReadError

logger = logging.getLogger("dinov2")

# Pillow's own threshold: the RGB pixels of one image take 256 MiB. A worker that decodes more than that for
# one crop of 224 px reads the wrong kind of file.
MAX_PIXELS = 89_478_485

JPEG_START, JPEG_SCAN, JPEG_END = b"\xff\xd8", b"\xff\xda", b"\xff\xd9"
# What libjpeg paints where the data have run out.
JPEG_FILLING = (128, 128, 128)


class Decoder:
    """Holds something as it is stored until :meth:`decode` is called.

    Args:
        stored: content of an image file, or a label.
    """

    def __init__(self, stored: Any) -> None:
        self._stored = stored

    def decode(self) -> Any:
        """Return the decoded value."""
        raise NotImplementedError


class TargetDecoder(Decoder):
    """Hands out a label as it is."""

    def decode(self) -> Any:
        """Return the label."""
        return self._stored


class DenseTargetDecoder(Decoder):
    """Decodes a label map; its pixel values are kept as they are."""

    def decode(self) -> Image.Image:
        """Return the image in the mode it was stored in, read completely.

        Raises:
            ImageReadError: as :meth:`ImageDataDecoder.decode`.
        """
        return _decode(self._stored, as_rgb=False)


class ImageDataDecoder(Decoder):
    """Decodes an encoded image of any format that PIL knows."""

    def decode(self) -> Image.Image:
        """Return the image with three 8-bit channels, read completely.

        Of several pages or frames the first counts. EXIF orientation and ICC profiles are ignored.

        Raises:
            ImageReadError: the bytes are no image, damaged, too large, or of an undefined range of values.
        """
        return _decode(self._stored, as_rgb=True)


def _decode(data: bytes, *, as_rgb: bool) -> Image.Image:
    _refuse_truncated_images()
    try:
        with Image.open(BytesIO(data)) as image:
            check_size(image.size)
            if image.format in ("JPEG", "MPO"):
                check_jpeg_end(data)
            image.load()
            pixels = to_rgb(image) if as_rgb else image.copy()
            if image.format in ("JPEG", "MPO"):
                _check_jpeg_filling(data, image)
            return pixels
    except (ImageReadError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        # Pillow names the buffer it was given, which tells a user nothing.
        reason = "no image of a known format, or cut off in its header" if data else "an empty file"
        raise ImageReadError(f"{reason} ({len(data)} bytes)") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageReadError(f"{_TOO_LARGE} ({error})") from error
    # What Pillow's decoders raise on damaged data is not documented: OSError, SyntaxError, struct.error, ...
    except Exception as error:
        raise ImageReadError(f"damaged or cut off ({type(error).__name__}: {error})") from error


_TOO_LARGE = f"more than {MAX_PIXELS:,} pixels: cut it into tiles first"


def check_size(size: tuple[int, int]) -> None:
    """Refuse huge images before a pixel is decoded, whatever Pillow's own limit has been set to."""
    width, height = size
    if width * height > MAX_PIXELS:
        raise ImageReadError(f"{width} x {height} pixels are {_TOO_LARGE}")


def _refuse_truncated_images() -> None:
    """Some libraries tell Pillow, for the whole process, to fill up cut files with grey; undo that."""
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        logger.warning("ImageFile.LOAD_TRUNCATED_IMAGES is turned off: it fills up cut images with grey")
        ImageFile.LOAD_TRUNCATED_IMAGES = False


def check_jpeg_end(data: bytes) -> None:
    """Find the end mark behind the last scan: a file whose tail was lost to zeros may decode without it."""
    if not data.endswith(JPEG_END) and data.rfind(JPEG_END) < data.rfind(JPEG_SCAN):
        raise ImageReadError("cut off: the JPEG data have no end mark, the tail of the file is missing")


def _check_jpeg_filling(data: bytes, image: Image.Image) -> None:
    """Tell a grey picture from one whose data ended early, though its end mark is there.

    Bytes in front of the end mark are left over, and ignored, if all pixels have been decoded; if not, they
    become pixels.
    """
    corner = image.getpixel((image.width - 1, image.height - 1))
    if corner not in (JPEG_FILLING, JPEG_FILLING[0]):
        return
    end = data.rfind(JPEG_END)
    with Image.open(BytesIO(data[:end] + b"\x55" * 64 + data[end:])) as longer:
        if longer.tobytes() != image.tobytes():
            raise ImageReadError("cut off: the JPEG data end before the picture does")
