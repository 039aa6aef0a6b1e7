"""The eight released backbones: four sizes with patch 14, each with and without four register tokens."""

import math
from collections.abc import Callable
from enum import Enum
from typing import Any

from dinov2.errors import WeightsError, nearest
from dinov2.hub.utils import release_url
from dinov2.models import ARCHITECTURES
from dinov2.models.conversion import is_square
from dinov2.models.pretrained import load_backbone, open_weights
from dinov2.models.releases import NUM_REGISTER_TOKENS, PATCH_SIZE
from dinov2.models.vision_transformer import DinoVisionTransformer


class Weights(Enum):
    """What the released backbones were pretrained on."""

    LVD142M = "LVD142M"


def weights_source(weights: Enum | str, released: type[Enum], url: str) -> str:
    """Return what to load: ``url`` if ``weights`` names a release, or else the path or address it is.

    Raises:
        WeightsError: ``weights`` is a bare word that names no release.
    """
    name = weights.value if isinstance(weights, Enum) else str(weights)
    accepted = [member.value for member in released]
    if name in accepted:
        return url
    if not any(mark in name for mark in "./\\:"):
        raise WeightsError(
            f'weights="{name}" is unknown{nearest(name, accepted)}: accepted is {" or ".join(accepted)}, '
            "the path of a file or folder (./name for one without a dot), or an address."
        )
    return name


def released_backbone(
    arch_name: str,
    *,
    registers: bool = False,
    pretrained: bool = True,
    weights: Weights | str = Weights.LVD142M,
    **kwargs: Any,
) -> DinoVisionTransformer:
    """Build a backbone as it was released, and load its weights.

    Args:
        arch_name: ``vit_small``, ``vit_base``, ``vit_large`` or ``vit_giant2``.
        registers: The variant with register tokens, whose positions are resized with antialiasing and
            without offset.
        pretrained: Load weights; otherwise they are random.
        weights: ``LVD142M`` for the release, or the path or address of other weights for this architecture.
        kwargs: Further options of :class:`DinoVisionTransformer`, in place of the released ones. Positions
            keep the grid they are stored with, unless ``img_size`` is given.

    Raises:
        WeightsError: The weights cannot be had or do not fit.
    """
    num_registers = NUM_REGISTER_TOKENS if registers else 0
    source = weights_source(weights, Weights, release_url(arch_name, PATCH_SIZE, num_registers, "pretrain"))
    if not pretrained and weights not in (Weights.LVD142M, Weights.LVD142M.value):
        raise WeightsError(f'weights="{weights}" and pretrained=False contradict each other: leave one out.')
    options = {
        "img_size": 518,
        "patch_size": PATCH_SIZE,
        "init_values": 1.0,
        "ffn_layer": "swiglufused" if arch_name == "vit_giant2" else "mlp",
        "block_chunks": 0,
        "num_register_tokens": num_registers,
        "interpolate_antialias": registers,
        "interpolate_offset": 0.0 if registers else 0.1,
    }
    if not pretrained:
        return ARCHITECTURES[arch_name](**{**options, **kwargs})
    opened = open_weights(source)
    if is_square(opened.patches or 0):  # resampling there and back again would change a finetuned model
        options["img_size"] = math.isqrt(opened.patches) * PATCH_SIZE
    model = ARCHITECTURES[arch_name](**{**options, **kwargs})
    load_backbone(model, opened)
    return model


def _entry_point(arch_name: str, *, registers: bool = False) -> Callable[..., DinoVisionTransformer]:
    def build(
        *, pretrained: bool = True, weights: Weights | str = Weights.LVD142M, **kwargs: Any
    ) -> DinoVisionTransformer:
        return released_backbone(
            arch_name, registers=registers, pretrained=pretrained, weights=weights, **kwargs
        )

    variant = " with register tokens" if registers else ""
    build.__doc__ = f"The released {arch_name} with patch 14{variant}; see `released_backbone` for arguments."
    return build


dinov2_vits14 = _entry_point("vit_small")
dinov2_vitb14 = _entry_point("vit_base")
dinov2_vitl14 = _entry_point("vit_large")
dinov2_vitg14 = _entry_point("vit_giant2")
dinov2_vits14_reg = _entry_point("vit_small", registers=True)
dinov2_vitb14_reg = _entry_point("vit_base", registers=True)
dinov2_vitl14_reg = _entry_point("vit_large", registers=True)
dinov2_vitg14_reg = _entry_point("vit_giant2", registers=True)
