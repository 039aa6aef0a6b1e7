"""Crops as tensors: one resampling step per crop, colours in float32 on the small crops only.

The image stays in 8 bits until a crop is cut. Regions are resized by torch's antialiased bicubic kernel for
8-bit images, which agrees with PIL's to one level.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2.data.crop_parameters import CropParameters, CropRecipe, draw_crop, to_row
from dinov2.data.photometric import change_colours, normalizers
from dinov2.data.random_stream import RandomStream


def cut(image: Tensor, size: int, crop: CropParameters) -> Tensor:
    """Return the region of an image [1, 3, H, W] as uint8 [1, 3, size, size], flipped and turned.

    The result lies channels last in memory, as the kernel leaves it.
    """
    top, left, height, width = crop.box
    region = image[:, :, top : top + height, left : left + width]
    region = region.contiguous(memory_format=torch.channels_last)
    resized = F.interpolate(region, (size, size), mode="bicubic", antialias=True)
    mirrored = [dim for dim, flip in ((-1, crop.flip_horizontal), (-2, crop.flip_vertical)) if flip]
    if mirrored:
        resized = resized.flip(mirrored)
    return resized.rot90(crop.quarter_turns, (-2, -1)) if crop.quarter_turns else resized


class FastCrop:
    """Makes one kind of crop completely: a normalised float tensor.

    Args:
        recipe: of the crop.
        mean, std: of the normalisation, per channel of 0..1.
    """

    def __init__(self, recipe: CropRecipe, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        self.recipe = recipe
        self.offset, self.scale = normalizers(torch.tensor(mean), torch.tensor(std))

    def __call__(self, image: Tensor, stream: RandomStream) -> Tensor:
        """Return [3, size, size] float32 of an image, uint8 [1, 3, H, W]."""
        crop = draw_crop(self.recipe, image.shape[3], image.shape[2], stream)
        pixels = cut(image, self.recipe.size, crop).contiguous().float()
        coloured = change_colours(pixels, crop.photometrics)
        return torch.addcmul(self.offset, coloured, self.scale)[0]


class RawCrop:
    """Cuts one kind of crop and leaves its colours to the device.

    Args:
        recipe: of the crop.
    """

    def __init__(self, recipe: CropRecipe) -> None:
        self.recipe = recipe

    def __call__(self, image: Tensor, stream: RandomStream) -> tuple[Tensor, list[float]]:
        """Return uint8 [3, size, size] of an image, and as a row of numbers what its colours still need."""
        crop = draw_crop(self.recipe, image.shape[3], image.shape[2], stream)
        return cut(image, self.recipe.size, crop)[0], to_row(crop.photometrics)
