"""Haematoxylin and eosin as separate channels, and jitter of the two.

A stain attenuates light by Beer and Lambert's law, so in optical density (minus the logarithm of transmitted
light) the colours of a section are sums of the colours of its stains. Ruifrok & Johnston, "Quantification of
histochemical staining by color deconvolution" (2001), measured the colours; Tellez et al., "Whole-slide
mitosis detection in H&E breast histology using PHH3 as a reference" (2018), section II-C, vary the amounts.
"""

from functools import cache

import torch
from torch import Tensor

# Optical density of red, green and blue for one unit of stain.
STAIN_COLOURS = (
    (0.65, 0.70, 0.29),  # haematoxylin
    (0.07, 0.99, 0.11),  # eosin
    (0.27, 0.57, 0.78),  # diaminobenzidine; in a section without it, what the two do not explain
)


@cache
def _stain_colours() -> Tensor:
    return torch.tensor(STAIN_COLOURS, dtype=torch.float64)


def optical_density(x: Tensor) -> Tensor:
    """Natural-logarithm optical density of grey levels 0..255; level 0 is taken for half a level."""
    return (x.clamp(min=0.5) / 255).log_().neg_()


def adjust_stains(x: Tensor, factors: Tensor, shifts: Tensor) -> Tensor:
    """Multiply the amount of each stain and add to it.

    Factors of 1 and shifts of 0 change nothing. Amounts are not clipped at 0, so that they can do so.

    Args:
        x: grey levels [N, 3, H, W], 0..255.
        factors: [N, 3] of haematoxylin, eosin, residual.
        shifts: [N, 3] added to the amounts, natural-logarithm optical density.

    Returns:
        Whole grey levels [N, 3, H, W].
    """
    colours = _stain_colours().to(factors.device)
    # Both changes of the amounts, seen from the colours: an affine map of optical densities per crop.
    matrix = (colours.inverse() @ torch.diag_embed(factors.double()) @ colours).to(x)[..., None, None]
    offset = (shifts.double() @ colours).to(x)[..., None, None]
    density = optical_density(x)
    # Written out, as matrix products on a GPU may round to ten bits (TF32).
    changed = torch.addcmul(offset, density[:, 0:1], matrix[:, 0])
    changed.addcmul_(density[:, 1:2], matrix[:, 1]).addcmul_(density[:, 2:3], matrix[:, 2])
    return changed.neg_().exp_().mul_(255).clamp_(max=255).round_()
