"""Colour changes drawn from a recipe in which every step happens often."""

import torch

from dinov2.data import DataAugmentationDINO
from dinov2.data.crop_parameters import Photometrics, draw_crop
from dinov2.data.random_stream import RandomStream


def draw_records(count: int) -> list[Photometrics]:
    augmentation = DataAugmentationDINO(
        (0.32, 1.0), (0.05, 0.32), 1, solarize_prob=0.5, hed_jitter=0.1, hed_jitter_prob=0.5
    )
    torch.manual_seed(0)
    stream = RandomStream()
    recipe = augmentation.recipes["global_2"]
    return [draw_crop(recipe, 224, 224, stream).photometrics for _ in range(count)]
