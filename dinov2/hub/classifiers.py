"""The released backbones with their linear ImageNet classifiers. B images, D width, H W pixels."""

from collections.abc import Callable
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from dinov2.errors import WeightsError
from dinov2.hub.backbones import NUM_REGISTER_TOKENS, PATCH_SIZE, released_backbone, weights_source
from dinov2.hub.backbones import Weights as BackboneWeights
from dinov2.hub.utils import release_url
from dinov2.models.pretrained import read_state_dict
from dinov2.models.vision_transformer import DinoVisionTransformer

NUM_CLASSES = 1000
HEAD_SUFFIXES = {1: "linear_head", 4: "linear4_head"}  # blocks used -> released file


class Weights(Enum):
    """What the released classifiers were trained on."""

    IMAGENET1K = "IMAGENET1K"


class LinearClassifier(nn.Module):
    """A linear layer on the cls tokens of the last blocks and the mean patch token of the last one.

    Args:
        backbone: The feature extractor.
        layers: Number of last blocks whose cls tokens are used.
    """

    def __init__(self, backbone: DinoVisionTransformer, *, layers: int = 4) -> None:
        super().__init__()
        self.backbone = backbone
        self.linear_head = nn.Linear((1 + layers) * backbone.embed_dim, NUM_CLASSES)
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``[B, 1000]`` for images ``[B, 3, H, W]``."""
        outputs = self.backbone.get_intermediate_layers(x, n=self.layers, return_class_token=True)
        last_patches = outputs[-1][0]  # [B, N, D]
        features = [cls_token for _, cls_token in outputs] + [last_patches.mean(dim=1)]
        return self.linear_head(torch.cat(features, dim=1))


def released_classifier(
    arch_name: str,
    *,
    registers: bool = False,
    layers: int = 4,
    pretrained: bool = True,
    weights: Weights | str = Weights.IMAGENET1K,
    backbone_weights: BackboneWeights | str = BackboneWeights.LVD142M,
    **kwargs: Any,
) -> LinearClassifier:
    """Build a classifier as it was released, and load its weights.

    Args:
        arch_name: ``vit_small``, ``vit_base``, ``vit_large`` or ``vit_giant2``.
        registers: The variant with register tokens.
        layers: 1 or 4, the number of last blocks whose cls tokens are used.
        pretrained: Load the weights of backbone and linear layer; otherwise they are random.
        weights: ``IMAGENET1K`` for the released linear layer, or the path or address of another.
        backbone_weights: ``LVD142M`` for the released backbone, or the path or address of another.
        kwargs: Further options of the backbone.

    Raises:
        WeightsError: ``layers`` is neither 1 nor 4, or weights cannot be had or do not fit.
    """
    if layers not in HEAD_SUFFIXES:
        raise WeightsError(f"layers={layers} has no released classifier: accepted is 1 or 4.")
    num_registers = NUM_REGISTER_TOKENS if registers else 0
    url = release_url(arch_name, PATCH_SIZE, num_registers, HEAD_SUFFIXES[layers])
    source = weights_source(weights, Weights, url)
    backbone = released_backbone(
        arch_name, registers=registers, pretrained=pretrained, weights=backbone_weights, **kwargs
    )
    model = LinearClassifier(backbone, layers=layers)
    if pretrained:
        _load_linear(model.linear_head, source)
    return model


def _load_linear(linear: nn.Linear, source: str) -> None:
    """Load a file with the entries ``weight`` and ``bias``."""
    state = read_state_dict(source)
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    expected = {name: tuple(tensor.shape) for name, tensor in linear.state_dict().items()}
    if found != expected:
        raise WeightsError(
            f"The linear layer in {source} does not fit: it has {dict(list(found.items())[:3])}, expected is "
            f"{expected}; layers and the backbone's size decide the width."
        )
    linear.load_state_dict(state, strict=True)


def _entry_point(arch_name: str, *, registers: bool = False) -> Callable[..., LinearClassifier]:
    def build(
        *,
        layers: int = 4,
        pretrained: bool = True,
        weights: Weights | str = Weights.IMAGENET1K,
        **kwargs: Any,
    ) -> LinearClassifier:
        return released_classifier(
            arch_name, registers=registers, layers=layers, pretrained=pretrained, weights=weights, **kwargs
        )

    build.__doc__ = f"Classifier on {arch_name} with patch 14; see `released_classifier` for arguments."
    return build


dinov2_vits14_lc = _entry_point("vit_small")
dinov2_vitb14_lc = _entry_point("vit_base")
dinov2_vitl14_lc = _entry_point("vit_large")
dinov2_vitg14_lc = _entry_point("vit_giant2")
dinov2_vits14_reg_lc = _entry_point("vit_small", registers=True)
dinov2_vitb14_reg_lc = _entry_point("vit_base", registers=True)
dinov2_vitl14_reg_lc = _entry_point("vit_large", registers=True)
dinov2_vitg14_reg_lc = _entry_point("vit_giant2", registers=True)
