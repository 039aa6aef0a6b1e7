"""From the pixels of any kind of image to three 8-bit channels."""

from typing import Any

import numpy as np
from PIL import Image, ImageChops

from dinov2.errors import ImageReadError

BITS_PER_SAMPLE, PHOTOMETRIC, PLANAR_CONFIGURATION = 258, 262, 284  # tags of TIFF
MIN_IS_WHITE, PLANES_APART = 0, 2


def to_rgb(image: Image.Image) -> Image.Image:
    """Return a loaded image as RGB with 8 bits per channel; a JPEG that is so already is returned itself.

    Transparent pixels are laid over white, the background of slides. 16-bit values keep their upper byte, so
    that 0..65535 becomes 0..255. CMYK becomes RGB by the plain formula ``(255 - ink)(255 - black) / 255``.

    Raises:
        ImageReadError: 32-bit or floating-point pixels, whose range is not defined.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        return _from_16_bits(image)
    if image.mode in ("I", "F"):
        kind = "32-bit" if image.mode == "I" else "floating-point"
        raise ImageReadError(f"{kind} pixels have no defined range: save the image with 8 or 16 bits")
    if _has_16_bit_planes(image):
        # Pillow reads every second byte as a pixel.
        raise ImageReadError("16-bit TIFF with one plane per colour: save it with interleaved colours")
    if image.mode == "CMYK" and image.format == "JPEG" and "adobe" not in image.info:
        # Adobe stores inverted inks and marks its files; Pillow takes all files as marked.
        return ImageChops.invert(image).convert("RGB")
    if image.mode != "RGB" or "transparency" in image.info:
        return _over_white(image) if image.has_transparency_data else image.convert("RGB")
    # Other formats may keep their file for further pages.
    return image if image.format == "JPEG" else image.convert("RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    """Pillow would clip the values at 255."""
    values = np.asarray(image).astype(np.uint16)
    if _tag(image, PHOTOMETRIC) == MIN_IS_WHITE:
        values = np.iinfo(np.uint16).max - values
    return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")


def _over_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def _has_16_bit_planes(image: Image.Image) -> bool:
    bits = _tag(image, BITS_PER_SAMPLE) or (8,)
    return len(bits) > 1 and max(bits) > 8 and _tag(image, PLANAR_CONFIGURATION) == PLANES_APART


def _tag(image: Image.Image, number: int) -> Any:
    return image.tag_v2.get(number) if image.format == "TIFF" else None
