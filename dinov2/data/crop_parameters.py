"""Every random decision of a crop, drawn before any pixel is touched.

The draws are those of the reference augmentation (torchvision's transforms on PIL images) in the same
order, so under the same seed every pipeline makes the same crops.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from dinov2.data.random_stream import RandomStream
from dinov2.errors import UnsuitableImageError

JITTER_CENTERS = (1.0, 1.0, 1.0, 0.0)  # brightness, contrast, saturation, hue that change nothing
BLUR_SIGMA = (0.1, 2.0)  # pixels
ATTEMPTS = 10  # boxes tried before the middle of the image is taken, as in torchvision
SCALE_REFERENCES = ("image", "crop")


@dataclass(frozen=True, kw_only=True)
class CropRecipe:
    """How one kind of crop is made; probabilities are 0..1, and a step of probability 0 draws nothing.

    Attributes:
        size: side of the crop, pixels.
        scale: smallest and largest area of the region cut out, see ``scale_reference``.
        scale_reference: ``"image"`` if areas are shares of the image, ``"crop"`` if they are multiples of
            the crop's own area, ``size ** 2`` pixels of the image.
        aspect_ratio: smallest and largest width / height of the region.
        horizontal_flip_prob, vertical_flip_prob: probability of a left-right, an up-down flip.
        quarter_turn_prob: probability of a turn by 90, 180 or 270 degrees, one as likely as the other.
        hed_jitter, hed_jitter_prob: strength and probability of stain jitter (:mod:`dinov2.data.stains`).
        color_jitter, color_jitter_prob: strengths of brightness, contrast, saturation, hue; probability.
        grayscale_prob: probability of a grey crop.
        blur_prob: probability of a Gaussian blur. Unlike the others it draws its number at 0 as well, as
            the published recipe does.
        solarize_prob: probability that pixels from 128 on are inverted.
    """

    size: int
    scale: tuple[float, float]
    scale_reference: str
    aspect_ratio: tuple[float, float]
    horizontal_flip_prob: float
    vertical_flip_prob: float
    quarter_turn_prob: float
    hed_jitter: float
    hed_jitter_prob: float
    color_jitter: tuple[float, float, float, float]
    color_jitter_prob: float
    grayscale_prob: float
    blur_prob: float
    solarize_prob: float

    @cached_property
    def jitter_ranges(self) -> tuple[tuple[float, float] | None, ...]:
        """The range of each factor as torchvision's ``ColorJitter`` has it; None where strength is 0."""
        ranges = []
        for strength, center in zip(self.color_jitter, JITTER_CENTERS, strict=True):
            low = max(center - strength, 0.0) if center else -strength
            ranges.append((low, center + strength) if strength > 0 else None)
        return tuple(ranges)

    @cached_property
    def log_aspect_ratio(self) -> tuple[float, float]:
        """Logarithm of ``aspect_ratio`` in float32, as torchvision takes it."""
        low, high = torch.log(torch.tensor(self.aspect_ratio)).tolist()
        return low, high

    def image_shares(self, width: int, height: int) -> tuple[float, float]:
        """Return ``scale`` as shares of an image of ``width`` x ``height`` pixels.

        Regions larger than the image are left out: the upper limit ends at 1.

        Raises:
            UnsuitableImageError: the image is smaller than the smallest region.
        """
        if self.scale_reference == "image":
            return self.scale
        low, high = (scale * self.size**2 / (width * height) for scale in self.scale)
        if low > 1:
            side = math.ceil(self.size * math.sqrt(self.scale[0]))
            raise UnsuitableImageError(
                f"the image has {width} x {height} pixels, a smaller area than the {side} x {side} of the "
                "smallest crop region (crops.scale_reference=crop): use larger tiles, or lower the scales"
            )
        return low, min(high, 1.0)


class Photometrics(NamedTuple):
    """What happens to the colours of one crop, in the order of the fields."""

    hed: tuple[float, ...] = ()  # factors of haematoxylin, eosin, residual, then what is added; () for none
    order: tuple[int, ...] = ()  # jitters that happen: 0 brightness, 1 contrast, 2 saturation, 3 hue
    factors: tuple[float, ...] = JITTER_CENTERS  # of brightness, contrast, saturation, hue
    grayscale: bool = False
    sigma: float = 0.0  # of the blur, pixels; 0 for none
    solarize: bool = False


# A record as a row: 1 + 6 numbers for HED, 4 for the order (-1: nothing), 4 factors, grey, sigma, solarize.
ROW_LENGTH = 18


def to_row(record: Photometrics) -> list[float]:
    """Write a record as ``ROW_LENGTH`` numbers."""
    hed = [1.0, *record.hed] if record.hed else [0.0] * 7
    order = [*record.order, *[-1] * (4 - len(record.order))]
    return [*hed, *order, *record.factors, record.grayscale, record.sigma, record.solarize]


def from_row(row: list[float]) -> Photometrics:
    """Read a record that :func:`to_row` wrote."""
    return Photometrics(
        hed=tuple(row[1:7]) if row[0] else (),
        order=tuple(int(step) for step in row[7:11] if step >= 0),
        factors=tuple(row[11:15]),
        grayscale=bool(row[15]),
        sigma=row[16],
        solarize=bool(row[17]),
    )


class Box(NamedTuple):
    """A region of the image, pixels."""

    top: int
    left: int
    height: int
    width: int


class CropParameters(NamedTuple):
    """All decisions about one crop."""

    box: Box
    flip_horizontal: bool
    flip_vertical: bool
    quarter_turns: int  # counterclockwise, after the flips
    photometrics: Photometrics


def draw_crop(recipe: CropRecipe, width: int, height: int, stream: RandomStream) -> CropParameters:
    """Decide about one crop of an image of ``width`` x ``height`` pixels.

    Raises:
        UnsuitableImageError: the image is too small for the recipe.
    """
    box = draw_box(recipe, width, height, stream)
    flip_horizontal = _happens(stream, recipe.horizontal_flip_prob)
    flip_vertical = _happens(stream, recipe.vertical_flip_prob)
    turns = 1 + stream.below(3) if _happens(stream, recipe.quarter_turn_prob) else 0
    hed: tuple[float, ...] = ()
    if _happens(stream, recipe.hed_jitter_prob):
        strength = recipe.hed_jitter
        hed = tuple(stream.uniform(1 - strength, 1 + strength) for _ in range(3))
        hed += tuple(stream.uniform(-strength, strength) for _ in range(3))
    order, factors = _draw_jitter(recipe, stream)
    grayscale = _happens(stream, recipe.grayscale_prob)
    sigma = stream.uniform(*BLUR_SIGMA) if stream.unit() <= recipe.blur_prob else 0.0
    solarize = _happens(stream, recipe.solarize_prob)
    colours = Photometrics(hed, order, factors, grayscale, sigma, solarize)
    return CropParameters(box, flip_horizontal, flip_vertical, turns, colours)


def draw_box(recipe: CropRecipe, width: int, height: int, stream: RandomStream) -> Box:
    """Choose the region: area and logarithm of the aspect ratio uniform, then its place uniform."""
    low, high = recipe.image_shares(width, height)
    for _ in range(ATTEMPTS):
        area = width * height * stream.uniform(low, high)
        aspect = math.exp(stream.uniform(*recipe.log_aspect_ratio))
        box_width = round(math.sqrt(area * aspect))
        box_height = round(math.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = stream.below(height - box_height + 1)
            return Box(top, stream.below(width - box_width + 1), box_height, box_width)
    # The largest box in the middle that keeps to the aspect ratios.
    narrow, wide = recipe.aspect_ratio
    box_width = min(width, round(height * wide))
    box_height = min(height, round(width / narrow))
    return Box((height - box_height) // 2, (width - box_width) // 2, box_height, box_width)


def _happens(stream: RandomStream, probability: float) -> bool:
    return probability > 0 and stream.unit() < probability


def _draw_jitter(recipe: CropRecipe, stream: RandomStream) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Return the steps of the colour jitter in their order, and the factor of each of the four."""
    if not (recipe.color_jitter_prob > 0 and stream.unit() <= recipe.color_jitter_prob):
        return (), JITTER_CENTERS
    order = stream.permutation(4)
    ranges = recipe.jitter_ranges
    factors = tuple(
        center if limits is None else stream.uniform(*limits)
        for limits, center in zip(ranges, JITTER_CENTERS, strict=True)
    )
    return tuple(step for step in order if ranges[step] is not None), factors
