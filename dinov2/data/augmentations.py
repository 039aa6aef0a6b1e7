"""Multi-crop augmentation of DINOv2 (arXiv:2304.07193, section 4; constants of the public recipe).

Three pipelines make the same crops under the same seed: ``reference`` is torchvision on PIL images, bit for
bit DINOv2's; ``fast`` and ``device`` are tensor operations that agree with it to a few grey levels.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torchvision import transforms

from dinov2.data.crop_parameters import SCALE_REFERENCES, CropRecipe
from dinov2.data.datasets.decoders import ImageDataDecoder
from dinov2.data.datasets.tensor_decoder import TensorDecoder, to_tensor
from dinov2.data.device_crops import NORMALISATION
from dinov2.data.fast_crops import FastCrop, RawCrop
from dinov2.data.random_stream import RandomStream
from dinov2.data.reference_crops import reference_crop
from dinov2.data.transforms import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from dinov2.errors import ConfigError, nearest

logger = logging.getLogger("dinov2")

BLUR_MODES = ("effective", "nominal")
NOMINAL_BLUR = {"global_1": 1.0, "global_2": 0.1, "local": 0.5}
PIPELINES = ("reference", "fast", "device")


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
        quarter_turn_prob: probability of a turn by 90, 180 or 270 degrees.
        color_jitter: strengths of brightness, contrast, saturation (at least 0) and hue (0..0.5).
        color_jitter_prob: probability of the four together.
        grayscale_prob: probability of a grey crop.
        solarize_prob: probability that the bright half of the second global crop is inverted.
        hed_jitter: strength of stain jitter: largest relative change of the amounts of haematoxylin, eosin
            and the residual, and largest addition to them, natural-logarithm optical density.
        hed_jitter_prob: probability of stain jitter.
        aspect_ratio: smallest and largest width / height of the region a crop is made of.
        scale_reference: ``"image"``: scales are shares of the image; ``"crop"``: multiples of the crop's
            own area, so that 1 cuts as many pixels as the crop has. Regions larger than the image are
            then left out.
        pipeline: ``"reference"``, ``"fast"`` or ``"device"``, see the module. Crops of the last are uint8
            and come with their colour changes, which :func:`dinov2.data.device_crops.finish_batch` makes.

    Raises:
        ConfigError: a word is not known, or ``local_crops_number`` is negative.
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
        quarter_turn_prob: float = 0.0,
        color_jitter: Sequence[float] = (0.4, 0.4, 0.2, 0.1),
        color_jitter_prob: float = 0.8,
        grayscale_prob: float = 0.2,
        solarize_prob: float = 0.2,
        hed_jitter: float = 0.0,
        hed_jitter_prob: float = 0.0,
        aspect_ratio: Sequence[float] = (3 / 4, 4 / 3),
        scale_reference: str = "image",
        pipeline: str = "reference",
    ) -> None:
        _require("gaussian_blur", gaussian_blur, BLUR_MODES)
        _require("scale_reference", scale_reference, SCALE_REFERENCES)
        _require("pipeline", pipeline, PIPELINES)
        if local_crops_number < 0:
            raise ConfigError(f"the number of local crops is {local_crops_number}; use 0 or more")
        self.local_crops_number = local_crops_number
        self.pipeline = pipeline
        # How datasets are to decode for this transform.
        self.image_decoder = ImageDataDecoder if pipeline == "reference" else TensorDecoder
        self.normalisation = torch.tensor([tuple(mean), tuple(std)], dtype=torch.float32)
        blurs = {kind: p if gaussian_blur == "nominal" else 1.0 - p for kind, p in NOMINAL_BLUR.items()}
        global_1 = CropRecipe(
            size=global_crops_size,
            scale=tuple(global_crops_scale),
            scale_reference=scale_reference,
            aspect_ratio=tuple(aspect_ratio),
            horizontal_flip_prob=horizontal_flip_prob,
            vertical_flip_prob=vertical_flip_prob,
            quarter_turn_prob=quarter_turn_prob,
            hed_jitter=hed_jitter,
            hed_jitter_prob=hed_jitter_prob,
            color_jitter=tuple(color_jitter),
            color_jitter_prob=color_jitter_prob,
            grayscale_prob=grayscale_prob,
            blur_prob=blurs["global_1"],
            solarize_prob=0.0,
        )
        self.recipes = {
            "global_1": global_1,
            "global_2": replace(global_1, blur_prob=blurs["global_2"], solarize_prob=solarize_prob),
            "local": replace(
                global_1, size=local_crops_size, scale=tuple(local_crops_scale), blur_prob=blurs["local"]
            ),
        }
        self.global_1, self.global_2, self.local = (
            self._crop_maker(recipe, tuple(mean), tuple(std)) for recipe in self.recipes.values()
        )
        logger.info("augmentation (%s): %s", pipeline, self.describe())

    def _crop_maker(
        self, recipe: CropRecipe, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> transforms.Compose | FastCrop | RawCrop:
        if self.pipeline == "reference":
            return reference_crop(recipe, mean, std)
        return RawCrop(recipe) if self.pipeline == "device" else FastCrop(recipe, mean, std)

    def describe(self) -> str:
        """Return what is done to an image, in one line."""
        first, second, local = self.recipes.values()
        unit = "" if first.scale_reference == "image" else " of the crop's area"
        steps = [
            f"flips {first.horizontal_flip_prob:g} horizontal and {first.vertical_flip_prob:g} vertical",
            f"quarter turns {first.quarter_turn_prob:g}",
            f"stain jitter {first.hed_jitter:g} at {first.hed_jitter_prob:g}",
            f"colour jitter {first.color_jitter} at {first.color_jitter_prob:g}",
            f"grey {first.grayscale_prob:g}",
            f"blur {first.blur_prob:g} / {second.blur_prob:g} / {local.blur_prob:g}",
            f"solarize {second.solarize_prob:g}",
        ]
        return (
            f"2 global crops of {first.size} px (scale {first.scale}{unit}), {self.local_crops_number} local "
            f"crops of {local.size} px (scale {local.scale}{unit}), {', '.join(steps)}"
        )

    def __call__(self, image: Any) -> dict[str, Any]:
        """Return the crops of an image.

        Args:
            image: a PIL image or, in the ``fast`` and ``device`` pipelines, also uint8 [1, 3, H, W].

        Returns:
            ``global_crops``: two tensors [3, H, W], normalised float32; ``global_crops_teacher``: the same
            two; ``local_crops``: L tensors [3, h, w]; ``offsets``: (). In the ``device`` pipeline they are
            uint8, and ``global_photometrics`` [2, P], ``local_photometrics`` [L, P] and ``normalisation``
            [2, 3] say what is still to be done.
        """
        makers = [self.global_1, self.global_2, *[self.local] * self.local_crops_number]
        if self.pipeline == "reference":
            return _sample([make(image) for make in makers])
        pixels = image if isinstance(image, torch.Tensor) else to_tensor(image)
        stream = RandomStream()
        crops = [make(pixels, stream) for make in makers]
        if self.pipeline == "fast":
            return _sample(crops)
        # By way of numpy in a quarter of the time that torch.tensor takes for a list.
        rows = torch.from_numpy(np.array([row for _, row in crops], dtype=np.float32))
        return {
            **_sample([crop for crop, _ in crops]),
            "global_photometrics": rows[:2],
            "local_photometrics": rows[2:],
            NORMALISATION: self.normalisation,
        }


def _sample(crops: list) -> dict[str, Any]:
    return {
        "global_crops": crops[:2],
        "global_crops_teacher": crops[:2],
        "local_crops": crops[2:],
        "offsets": (),
    }


def _require(name: str, value: str, accepted: Sequence[str]) -> None:
    if value not in accepted:
        raise ConfigError(f"{name} is {value!r}; use one of {', '.join(accepted)}{nearest(value, accepted)}")
