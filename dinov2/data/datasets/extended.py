"""The base of all datasets here: encoded image + label -> decoded -> transformed."""

from collections.abc import Callable
from typing import Any

from PIL import UnidentifiedImageError
from torchvision.datasets import VisionDataset

from dinov2.data.datasets.decoders import Decoder, ImageDataDecoder, TargetDecoder
from dinov2.errors import ImageReadError


class ExtendedVisionDataset(VisionDataset):
    """Dataset of images that are stored encoded.

    Subclasses define :meth:`get_image_data`, :meth:`get_target` and ``__len__``, and best also
    :meth:`get_image_path`.

    Args:
        root, transforms, transform, target_transform: as for torchvision's ``VisionDataset``.
        image_decoder: bytes -> decoder of the image.
        target_decoder: label -> decoder of the label.
    """

    def __init__(
        self,
        *args: Any,
        image_decoder: Callable[[bytes], Decoder] = ImageDataDecoder,
        target_decoder: Callable[[Any], Decoder] = TargetDecoder,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.image_decoder = image_decoder
        self.target_decoder = target_decoder

    def __len__(self) -> int:
        raise NotImplementedError

    def get_target(self, index: int) -> Any:
        """Return the label of a sample, None without labels."""
        raise NotImplementedError

    def get_image_data(self, index: int) -> bytes:
        """Return the encoded image of a sample."""
        raise NotImplementedError

    def get_image_path(self, index: int) -> str:
        """Return where the image of a sample lies, for messages; empty when it has no place of its own."""
        return ""

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """Return the transformed image and target.

        Raises:
            ImageReadError: (a RuntimeError) the image can not be read; names the sample and its path.
        """
        try:
            image = self.image_decoder(self.get_image_data(index)).decode()
        except Exception as error:
            raise ImageReadError(self._unreadable(index, error)) from error
        target = self.target_decoder(self.get_target(index)).decode()
        if self.transforms is not None:
            image, target = self.transforms(image, target)
        return image, target

    def _unreadable(self, index: int, error: Exception) -> str:
        try:
            path = self.get_image_path(index)
        except Exception:  # the place itself may be what is wrong; the first error says so
            path = ""
        where = f" ({path})" if path else ""
        # Pillow names the buffer it was given, which tells a user nothing.
        unknown = isinstance(error, UnidentifiedImageError)
        why = "empty, truncated or no image at all" if unknown else f"{type(error).__name__}: {error}"
        return f"can not read image for sample {index}{where}: {why}"
