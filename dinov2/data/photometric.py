"""Colour changes of crops as tensor operations, in the 8-bit arithmetic of PIL.

Crops are float32 [N, 3, H, W] that hold whole grey levels 0..255, and so does every result: PIL stores 8 bits
between two operations, and rounds as it does so (most operations cut off the fraction). Following it keeps
the mean brightness of a chain of operations the same. Factors are numbers, or tensors [N, 1, 1, 1] with one
per crop. The operations work on any device, wait for none, and can be compiled.

All operations equal PIL's exactly but two: a hue that is a whole number in 8 bits may be cut to the one below
(a pixel in thousands), and a blur may round a tie the other way.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2.data.crop_parameters import Photometrics
from dinov2.data.stains import adjust_stains
from dinov2.data.transforms import BLUR_KERNEL_SIZE

BLUR_RADIUS = BLUR_KERNEL_SIZE // 2
NEGLIGIBLE = 2e-5  # weight of a pixel that no longer counts: 0.01 grey levels for both sides together

Factor = float | Tensor


def to_gray(x: Tensor) -> Tensor:
    """Return luma (ITU-R 601) as PIL's mode L has it, [N, 1, H, W]; the sums stay exact in float32."""
    gray = x[:, 0:1] * 19595
    gray.add_(x[:, 1:2], alpha=38470).add_(x[:, 2:3], alpha=7471)
    return gray.add_(1 << 15).mul_(2.0**-16).floor_()


def _blend(x: Tensor, other: Tensor, factor: Factor) -> Tensor:
    """``other + factor * (x - other)`` within 0..255, the fraction cut off."""
    return (x - other).mul_(factor).add_(other).clamp_(0, 255).floor_()


def adjust_brightness(x: Tensor, factor: Factor) -> Tensor:
    """Multiply by ``factor`` >= 0."""
    return (x * factor).clamp_(max=255).floor_()


def adjust_contrast(x: Tensor, factor: Factor) -> Tensor:
    """Move away from the crop's mean luma, rounded to a level."""
    mean = to_gray(x).mean(dim=(1, 2, 3), keepdim=True).add_(0.5).floor_()
    return _blend(x, mean, factor)


def adjust_saturation(x: Tensor, factor: Factor) -> Tensor:
    """Move away from each pixel's luma."""
    return _blend(x, to_gray(x), factor)


def adjust_hue(x: Tensor, shift: Factor) -> Tensor:
    """Turn the hue of HSV by ``shift``, -0.5..0.5 of a full turn, with 8 bits per channel of HSV."""
    value = torch.maximum(torch.maximum(x[:, 0], x[:, 1]), x[:, 2])
    least = torch.minimum(torch.minimum(x[:, 0], x[:, 1]), x[:, 2])
    chroma = value - least
    steps = trunc(shift * 255)
    if isinstance(steps, Tensor):
        steps = steps[:, 0]
    # In 256ths of a turn, then as 0..6 where red is at 0, green at 2, blue at 4.
    hue = _hue_byte(x, value, chroma).add_(steps).mul_(1 / 256)
    hue.sub_(hue.floor()).mul_(256 * 6 / 255)
    saturation = chroma.div_(value.clamp(min=1)).mul_(255).floor_()
    reach = saturation.mul_(value).mul_(1 / 255)  # from the largest channel down to the smallest
    place, slope, start = _hue_ramps(x.device)
    depth = (hue[:, None] - place).abs_().mul_(slope).add_(start).clamp_(0, 1).mul_(reach[:, None])
    return torch.sub(value[:, None], depth).round_()


def trunc(number: Factor) -> Factor:
    """Cut off the fraction of a number or of the elements of a tensor."""
    return number.trunc() if isinstance(number, Tensor) else math.trunc(number)


def _hue_byte(x: Tensor, value: Tensor, chroma: Tensor) -> Tensor:
    """Return the hue [N, H, W] as a whole number 0..255; 0 for grey."""
    red, green, blue = x.unbind(dim=1)
    # Levels are whole, so this is 1 where the channel is the largest and 0 elsewhere. Where two are the
    # largest, their formulas agree up to a full turn.
    is_green = (green - value).add_(1).clamp_(min=0)
    is_red = (red - value).add_(1).clamp_(min=0)
    sixths = (red - green).add_(chroma, alpha=4)
    sixths.lerp_((blue - red).add_(chroma, alpha=2), is_green).lerp_(green - blue, is_red)
    sixths.div_(chroma.clamp(min=1))
    # Many hues are whole numbers but for rounding, and cutting off makes a whole step of the last bit, so
    # float64 stands where PIL has it.
    turn = sixths.double().div_(6).add_(1)
    turn.sub_(turn.floor())
    return turn.float().double().mul_(255).floor_().float()


@cache
def _hue_ramps(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Place, slope and start of the ramps that red, green and blue follow as the hue goes from 0 to 6."""
    ramps = torch.tensor([[3, 2, 4], [-1, 1, 1], [2, -1, -1]], dtype=torch.float32)
    return tuple(ramps.view(3, 1, 3, 1, 1).to(device).unbind())


def gaussian_blur(x: Tensor, sigma: Factor) -> Tensor:
    """Blur with a kernel of 9 x 9 pixels, edges mirrored, and round.

    Args:
        x: [N, 3, H, W], H and W above 4.
        sigma: standard deviation, pixels; a number or [N, 1, 1, 1].
    """
    weights = blur_weights(sigma)
    radius = len(weights) - 1
    if radius == 0:
        return x
    padded = F.pad(x, (radius,) * 4, mode="reflect")
    return _weighted(_weighted(padded, weights, -1), weights, -2).round_()


def blur_weights(sigma: Factor) -> list[Factor]:
    """Return the weights of the middle pixel and of the neighbours at distance 1, 2, ... on either side.

    For a number, negligible ones at the end are left out; a tensor has all of them.
    """
    exp = torch.exp if isinstance(sigma, Tensor) else math.exp
    bell = [exp(-0.5 * (distance / sigma) ** 2) for distance in range(BLUR_RADIUS + 1)]
    total = bell[0] + 2 * sum(bell[1:])
    weights = [height / total for height in bell]
    if isinstance(sigma, Tensor):
        return weights
    return [weight for weight in weights if weight >= NEGLIGIBLE]


def _weighted(x: Tensor, weights: Sequence[Factor], dim: int) -> Tensor:
    """Sum neighbours along ``dim``; the result is shorter by the radius at both ends."""
    radius = len(weights) - 1
    length = x.shape[dim] - 2 * radius
    total = x.narrow(dim, radius, length) * weights[0]
    for distance, weight in enumerate(weights[1:], start=1):
        for start in (radius - distance, radius + distance):
            neighbour = x.narrow(dim, start, length)
            if isinstance(weight, Tensor):
                total.addcmul_(neighbour, weight)
            else:
                total.add_(neighbour, alpha=weight)
    return total


def solarize(x: Tensor) -> Tensor:
    """Invert levels from 128 on: for whole levels the smaller one of both."""
    return torch.minimum(x, 255 - x)


def grayscale(x: Tensor) -> Tensor:
    """Replace all channels by the luma."""
    return to_gray(x).expand_as(x).contiguous()


def normalize(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return ``(x / 255 - mean) / std`` with constants [3] for the channels of 0..1."""
    offset, scale = normalizers(mean, std)
    return torch.addcmul(offset.to(x), x, scale.to(x))


def normalizers(mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """Return what :func:`normalize` adds to levels and multiplies them by, each [1, 3, 1, 1].

    For one small crop they take longer to compute than to apply.
    """
    scale = (1 / (255 * std.double())).float()
    return (-mean / std).view(1, 3, 1, 1), scale.view(1, 3, 1, 1)


JITTERS: tuple[Callable[[Tensor, Factor], Tensor], ...] = (
    adjust_brightness,
    adjust_contrast,
    adjust_saturation,
    adjust_hue,
)


def change_colours(x: Tensor, record: Photometrics) -> Tensor:
    """Apply one record to crops [N, 3, H, W] of whole grey levels."""
    if record.hed:
        factors, shifts = torch.tensor(record.hed).view(2, 1, 3).expand(2, len(x), 3)
        x = adjust_stains(x, factors, shifts)
    for step in record.order:
        x = JITTERS[step](x, record.factors[step])
    if record.grayscale:
        x = grayscale(x)
    if record.sigma:
        x = gaussian_blur(x, record.sigma)
    return solarize(x) if record.solarize else x
