"""Multi-crop augmentation of DINOv2 (arXiv:2304.07193, section 4; constants of the public recipe)."""

import logging
from collections.abc import Sequence
from typing import Any

from torchvision import transforms
from torchvision.transforms import InterpolationMode

from dinov2.data.transforms import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    GaussianBlur,
    MaybeToTensor,
    make_normalize_transform,
)
from dinov2.errors import ConfigError

logger = logging.getLogger("dinov2")

BLUR_MODES = ("effective", "nominal")
NOMINAL_BLUR = {"global_1": 1.0, "global_2": 0.1, "local": 0.5}
SOLARIZE_THRESHOLD = 128


class DataAugmentationDINO:
    """Turns one image into two global and L local crops, each cropped, flipped and recoloured by itself.

    Args:
        global_crops_scale: smallest and largest share of the image area in a global crop, 0..1.
        local_crops_scale: the same for local crops.
        local_crops_number: L; 0 gives none.
        global_crops_size: side of a global crop, pixels.
        local_crops_size: side of a local crop, pixels.
        horizontal_flip_prob: probability of a left-right flip, 0..1.
        vertical_flip_prob: probability of an up-down flip, 0..1. DINOv2 has none; tissue has no up or
            down, and the histopathology forks use 0.5.
        mean: channel means of the normalisation; those the backbone was pretrained with.
        std: channel standard deviations of the normalisation.
        gaussian_blur: ``"effective"`` blurs as the published weights were trained (global crops 1 and 2
            and local crops with probability 0, 0.9 and 0.5), ``"nominal"`` as their recipe was meant (1,
            0.1 and 0.5).

    Raises:
        ConfigError: ``gaussian_blur`` is neither, or ``local_crops_number`` is negative.
    """

    def __init__(
        self,
        global_crops_scale: tuple[float, float],
        local_crops_scale: tuple[float, float],
        local_crops_number: int,
        global_crops_size: int = 224,
        local_crops_size: int = 96,
        *,
        horizontal_flip_prob: float = 0.5,
        vertical_flip_prob: float = 0.0,
        gaussian_blur: str = "effective",
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
    ) -> None:
        if gaussian_blur not in BLUR_MODES:
            raise ConfigError(f"gaussian_blur is {gaussian_blur!r}; use one of {', '.join(BLUR_MODES)}")
        if local_crops_number < 0:
            raise ConfigError(f"the number of local crops is {local_crops_number}; use 0 or more")
        self.local_crops_number = local_crops_number
        flips = _flips(horizontal_flip_prob, vertical_flip_prob)
        nominal = gaussian_blur == "nominal"
        to_input = [MaybeToTensor(), make_normalize_transform(mean, std)]
        solarize = [transforms.RandomSolarize(threshold=SOLARIZE_THRESHOLD, p=0.2)]
        self.global_1 = _view(global_crops_size, global_crops_scale, flips, "global_1", nominal, to_input)
        self.global_2 = _view(
            global_crops_size, global_crops_scale, flips, "global_2", nominal, [*solarize, *to_input]
        )
        self.local = _view(local_crops_size, local_crops_scale, flips, "local", nominal, to_input)
        logger.info(
            "augmentation: 2 global crops of %d px (scale %s), %d local crops of %d px (scale %s), flips "
            "%g horizontal and %g vertical, %s blur probabilities",
            *(global_crops_size, tuple(global_crops_scale)),
            *(local_crops_number, local_crops_size, tuple(local_crops_scale)),
            *(horizontal_flip_prob, vertical_flip_prob, gaussian_blur),
        )

    def __call__(self, image: Any) -> dict[str, Any]:
        """Return the crops of a PIL image as normalised float tensors.

        Returns:
            ``global_crops``: two tensors [3, H, W]; ``global_crops_teacher``: the same two;
            ``local_crops``: L tensors [3, h, w]; ``offsets``: ().
        """
        global_crops = [self.global_1(image), self.global_2(image)]
        return {
            "global_crops": global_crops,
            "global_crops_teacher": list(global_crops),
            "local_crops": [self.local(image) for _ in range(self.local_crops_number)],
            "offsets": (),
        }


def _flips(horizontal: float, vertical: float) -> list:
    """Flip steps; one with probability 0 is left out, so that it consumes no random number."""
    steps = [(transforms.RandomHorizontalFlip, horizontal), (transforms.RandomVerticalFlip, vertical)]
    return [step(p=probability) for step, probability in steps if probability > 0]


def _view(
    size: int, scale: tuple[float, float], flips: list, kind: str, nominal: bool, last: list
) -> transforms.Compose:
    """All steps of one kind of crop, in the order in which they draw random numbers."""
    jitter = transforms.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale=tuple(scale), interpolation=InterpolationMode.BICUBIC),
            *flips,
            transforms.RandomApply([jitter], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            GaussianBlur(p=NOMINAL_BLUR[kind], nominal=nominal),
            *last,
        ]
    )
