"""Crops as DINOv2 makes them: torchvision's transforms on PIL images, step by step."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as ops

from dinov2.data.crop_parameters import CropRecipe
from dinov2.data.stains import adjust_stains
from dinov2.data.transforms import GaussianBlur, MaybeToTensor, make_normalize_transform

SOLARIZE_THRESHOLD = 128


def reference_crop(recipe: CropRecipe, mean: Sequence[float], std: Sequence[float]) -> transforms.Compose:
    """Return all steps of one kind of crop, in the order in which they draw random numbers.

    Steps with probability 0 are left out, so that they draw none; the blur alone draws always, as it does in
    DINOv2, where the first global crop carries one that never happens.
    """
    jitter = transforms.ColorJitter(*recipe.color_jitter)
    optional = [
        (transforms.RandomHorizontalFlip, recipe.horizontal_flip_prob),
        (transforms.RandomVerticalFlip, recipe.vertical_flip_prob),
        (QuarterTurn, recipe.quarter_turn_prob),
        (lambda p: HedJitter(recipe.hed_jitter, p), recipe.hed_jitter_prob),
        (lambda p: transforms.RandomApply([jitter], p=p), recipe.color_jitter_prob),
        (transforms.RandomGrayscale, recipe.grayscale_prob),
    ]
    solarize = transforms.RandomSolarize(threshold=SOLARIZE_THRESHOLD, p=recipe.solarize_prob)
    return transforms.Compose(
        [
            RegionCrop(recipe),
            *(make(p=probability) for make, probability in optional if probability > 0),
            GaussianBlur(p=recipe.blur_prob, nominal=True),
            *([solarize] if recipe.solarize_prob > 0 else []),
            MaybeToTensor(),
            make_normalize_transform(mean, std),
        ]
    )


class RegionCrop(transforms.RandomResizedCrop):
    """Random resized crop whose scale may refer to the crop's own area (:class:`CropRecipe`)."""

    def __init__(self, recipe: CropRecipe) -> None:
        super().__init__(
            recipe.size, recipe.scale, recipe.aspect_ratio, interpolation=InterpolationMode.BICUBIC
        )
        self.recipe = recipe

    def forward(self, image: Any) -> Any:
        """Cut and resize."""
        _, height, width = ops.get_dimensions(image)
        box = self.get_params(image, self.recipe.image_shares(width, height), self.ratio)
        return ops.resized_crop(image, *box, self.size, self.interpolation)


class QuarterTurn:
    """Turn by 90, 180 or 270 degrees counterclockwise.

    Args:
        p: probability of a turn.
    """

    def __init__(self, p: float) -> None:
        self.p = p

    def __call__(self, image: Image.Image) -> Image.Image:
        """Turn a PIL image, or not."""
        if torch.rand(1).item() >= self.p:
            return image
        turns = (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)
        return image.transpose(turns[torch.randint(3, (1,)).item()])


class HedJitter:
    """Stain jitter (:mod:`dinov2.data.stains`).

    Args:
        strength: largest relative change of an amount of stain, and largest addition to it.
        p: probability of jitter.
    """

    def __init__(self, strength: float, p: float) -> None:
        self.strength = strength
        self.p = p

    def __call__(self, image: Image.Image) -> Image.Image:
        """Change the stains of a PIL image, or not."""
        if torch.rand(1).item() >= self.p:
            return image
        factors = torch.empty(1, 3).uniform_(1 - self.strength, 1 + self.strength)
        shifts = torch.empty(1, 3).uniform_(-self.strength, self.strength)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
        changed = adjust_stains(pixels, factors, shifts)[0].permute(1, 2, 0)
        return Image.fromarray(changed.byte().numpy())
