"""Decoding straight to a tensor, for transforms that would turn a PIL image into one first."""

from io import BytesIO

import torch
from PIL import Image
from torch import Tensor

from dinov2.data.datasets.decoders import (
    JPEG_FILLING,
    JPEG_START,
    ImageDataDecoder,
    check_jpeg_end,
    check_size,
)


def to_tensor(image: Image.Image) -> Tensor:
    """Return an RGB image as uint8 [1, 3, H, W], channels last in memory."""
    # Nobody else holds the bytes, so BytesIO gives them out as writable memory without a copy.
    pixels = torch.frombuffer(BytesIO(image.tobytes()).getbuffer(), dtype=torch.uint8)
    return pixels.view(1, image.height, image.width, 3).permute(0, 3, 1, 2)


class TensorDecoder(ImageDataDecoder):
    """Decodes to what :func:`to_tensor` returns; the pixels are those of :class:`ImageDataDecoder`.

    Ordinary JPEG files, which tiles are, take a third less time. Everything else, and every file in which
    something is wrong, goes by way of PIL, whose checks and messages count.
    """

    def decode(self) -> Tensor:
        """Return the image as uint8 [1, 3, H, W], channels last in memory.

        Raises:
            ImageReadError: as :meth:`ImageDataDecoder.decode`.
        """
        pixels = _decode_ordinary_jpeg(self._stored)
        return to_tensor(super().decode()) if pixels is None else pixels


def _decode_ordinary_jpeg(data: bytes) -> Tensor | None:
    """Return the pixels of an undamaged JPEG file with three colours; None for anything else."""
    from torchvision.io import ImageReadMode, decode_jpeg  # loads a library of its own

    if not data.startswith(JPEG_START):
        return None
    try:
        with Image.open(BytesIO(data)) as header:  # reads no pixel
            if header.format != "JPEG" or header.mode != "RGB":
                return None
            check_size(header.size)
        check_jpeg_end(data)
        encoded = torch.frombuffer(BytesIO(data).getbuffer(), dtype=torch.uint8)
        pixels = decode_jpeg(encoded, mode=ImageReadMode.RGB)
    except Exception:  # PIL says what is wrong, if it finds so too
        return None
    # The last pixel has this colour where the data may have run out: PIL's way looks closer.
    if tuple(pixels[:, -1, -1].tolist()) == JPEG_FILLING:
        return None
    return pixels[None]
