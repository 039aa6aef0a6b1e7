"""Image transforms with DINOv2's constants, on PIL images."""

from collections.abc import Sequence
from typing import Any

import torch
from torchvision import transforms
from torchvision.transforms import InterpolationMode

IMAGENET_DEFAULT_MEAN = (0.485, 0.456, 0.406)
IMAGENET_DEFAULT_STD = (0.229, 0.224, 0.225)

BLUR_KERNEL_SIZE = 9  # pixels, whatever the crop size


class GaussianBlur(transforms.RandomApply):
    """Gaussian blur with a random radius, on a random share of the images.

    Note:
        Upstream blurs with probability ``1 - p``, and the published weights were trained that way, so
        this is the default. ``nominal=True`` blurs with probability ``p``.

    Args:
        p: see the note, 0..1.
        radius_min: smallest standard deviation, pixels.
        radius_max: largest standard deviation, pixels.
        nominal: take ``p`` at its word.
    """

    def __init__(
        self, *, p: float = 0.5, radius_min: float = 0.1, radius_max: float = 2.0, nominal: bool = False
    ) -> None:
        blur = transforms.GaussianBlur(BLUR_KERNEL_SIZE, sigma=(radius_min, radius_max))
        super().__init__([blur], p=p if nominal else 1.0 - p)


class MaybeToTensor(transforms.ToTensor):
    """``ToTensor`` that lets tensors pass unchanged."""

    def __call__(self, pic: Any) -> torch.Tensor:
        return pic if isinstance(pic, torch.Tensor) else super().__call__(pic)


def make_normalize_transform(
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN, std: Sequence[float] = IMAGENET_DEFAULT_STD
) -> transforms.Normalize:
    """Return the channel-wise normalisation of a float image [3, H, W] in 0..1."""
    return transforms.Normalize(mean=tuple(mean), std=tuple(std))


def make_classification_train_transform(
    *,
    crop_size: int = 224,
    interpolation: InterpolationMode = InterpolationMode.BICUBIC,
    hflip_prob: float = 0.5,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
) -> transforms.Compose:
    """Return the transform for training a classifier: random resized crop, flip, normalisation.

    Args:
        crop_size: side of the result, pixels.
        interpolation: of the resized crop.
        hflip_prob: probability of a horizontal flip; 0 leaves the step out.
        mean: channel means.
        std: channel standard deviations.
    """
    flips = [transforms.RandomHorizontalFlip(hflip_prob)] if hflip_prob > 0.0 else []
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(crop_size, interpolation=interpolation),
            *flips,
            MaybeToTensor(),
            make_normalize_transform(mean, std),
        ]
    )


def make_classification_eval_transform(
    *,
    resize_size: int = 256,
    interpolation: InterpolationMode = InterpolationMode.BICUBIC,
    crop_size: int = 224,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
) -> transforms.Compose:
    """Return the transform for evaluation: resize the shorter side, centre crop, normalisation.

    Args:
        resize_size: shorter side after resizing, pixels.
        interpolation: of the resize.
        crop_size: side of the result, pixels.
        mean: channel means.
        std: channel standard deviations.
    """
    return transforms.Compose(
        [
            transforms.Resize(resize_size, interpolation=interpolation),
            transforms.CenterCrop(crop_size),
            MaybeToTensor(),
            make_normalize_transform(mean, std),
        ]
    )
