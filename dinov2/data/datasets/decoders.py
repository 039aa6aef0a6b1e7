"""From stored bytes and labels to what the transforms take."""

from io import BytesIO
from typing import Any

from PIL import Image


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
        """Return the image in the mode it was stored in, read completely."""
        image = Image.open(BytesIO(self._stored))
        image.load()
        return image


class ImageDataDecoder(Decoder):
    """Decodes an encoded image of any format that PIL knows."""

    def decode(self) -> Image.Image:
        """Return the image with three 8-bit channels, read completely."""
        with Image.open(BytesIO(self._stored)) as image:
            return image.convert("RGB")
