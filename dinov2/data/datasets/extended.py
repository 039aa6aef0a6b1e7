"""The base of all datasets here: encoded image + label -> decoded -> transformed."""

import lzma
import struct
import tarfile
import zlib
from collections.abc import Callable
from typing import Any

from torchvision.datasets import VisionDataset

from dinov2.data.datasets.decoders import Decoder, ImageDataDecoder, TargetDecoder
from dinov2.data.loader_errors import lacking_resource
from dinov2.errors import DataLoadingError, ImageReadError, UnsuitableImageError, UserError

# What reading and unpacking raise when the stored data are at fault. Other errors are the program's own.
UNREADABLE = (OSError, EOFError, ValueError, struct.error, zlib.error, lzma.LZMAError, tarfile.TarError)

_MEND = "mend it, or leave it out of the dataset"


class ExtendedVisionDataset(VisionDataset):
    """Dataset of images that are stored encoded.

    Subclasses define :meth:`get_image_data`, :meth:`get_target` and ``__len__``, and best also
    :meth:`get_image_path`.

    Args:
        root, transforms, transform, target_transform: as for torchvision's ``VisionDataset``.
        image_decoder: bytes -> decoder of the image. By default the one that ``transform`` names in an
            attribute ``image_decoder``, else :class:`ImageDataDecoder`.
        target_decoder: label -> decoder of the label.
    """

    def __init__(
        self,
        *args: Any,
        image_decoder: Callable[[bytes], Decoder] | None = None,
        target_decoder: Callable[[Any], Decoder] = TargetDecoder,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        wanted = getattr(self.transform, "image_decoder", ImageDataDecoder)
        self.image_decoder = wanted if image_decoder is None else image_decoder
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
            ImageReadError: (a RuntimeError) the image can not be read, or a transform can not use it; names
                the sample, its path and the reason.
            DataLoadingError: the machine has no memory or no free file handle left.
            RuntimeError: an error of the program, not of the image, while it was read.
        """
        try:
            image = self.image_decoder(self.get_image_data(index)).decode()
        except Exception as error:
            if isinstance(error, UserError) and not isinstance(error, ImageReadError):
                raise  # an index that is missing, say
            # The decoder's own words are in the message; the cause is what Pillow or the system said.
            raise self._explained(index, error) from (error.__cause__ or error)
        target = self.target_decoder(self.get_target(index)).decode()
        if self.transforms is None:
            return image, target
        try:
            return self.transforms(image, target)
        except ImageReadError as error:  # too small for the crops, say; only here is known which image it is
            raise self._explained(index, error) from error

    def _explained(self, index: int, error: Exception) -> Exception:
        """Return what to raise; only an :class:`ImageReadError` blames the image."""
        path = getattr(error, "path", "") or self._path_or_nothing(index)
        sample = f"can not read image for sample {index}{f' ({path})' if path else ''}"
        advice = lacking_resource(error)
        if advice:
            return DataLoadingError(f"{sample}: {advice}")
        if isinstance(error, UnsuitableImageError):  # its reason ends in what to do
            sentence = f"{sample.replace('read', 'use', 1)}: {error.reason}"
            return UnsuitableImageError(sentence, path=path, reason=error.reason)
        if isinstance(error, (ImageReadError, *UNREADABLE)):
            reason = error.reason if isinstance(error, ImageReadError) else _reason(error)
            return ImageReadError(f"{sample}: {reason}; {_MEND}", path=path, reason=reason)
        return RuntimeError(f"{sample}: {_reason(error)}")

    def _path_or_nothing(self, index: int) -> str:
        try:
            return self.get_image_path(index)
        except Exception:  # the place itself may be what is wrong; the first error says so
            return ""


def _reason(error: Exception) -> str:
    """Return the system's words alone, as the path stands in front of them already, or the error's own."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror[:1].lower() + error.strerror[1:]
    return f"{type(error).__name__}: {error}"
