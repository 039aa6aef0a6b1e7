"""What the layouts of other libraries share: renamed weights, the JSON files beside them, and remarks."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dinov2.models.conversion import flat_name
from dinov2.models.vision_transformer import DinoVisionTransformer

BIASED_LAYERS = ("attn.proj", "mlp.fc1", "mlp.fc2", "mlp.w12", "mlp.w3")


@dataclass(frozen=True)
class Normalisation:
    """Channel means and standard deviations that images are normalised with, of values in 0..1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Layout:
    """A model as another library stores it.

    Attributes:
        weights: Name in that library -> tensor.
        files: Name of a JSON file -> its content.
        notes: Sentences on what the library represents otherwise than the model does.
    """

    weights: dict[str, Tensor]
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def flat_weights(model: DinoVisionTransformer) -> dict[str, Tensor]:
    """Return the weights of a model, with or without block chunks, under flat DINOv2 names."""
    return {flat_name(name): tensor for name, tensor in model.state_dict().items()}


def with_biases(
    state: dict[str, Tensor], *, only_if_some: bool = False
) -> tuple[dict[str, Tensor], list[str]]:
    """Give the output projections and the feed-forward biases of zero where they have none.

    Args:
        state: Flat DINOv2 weights.
        only_if_some: Do nothing if none of these layers has a bias.

    Returns:
        The weights, and the names of the added ones.
    """
    layers = [name.removesuffix(".weight") for name in state if name.endswith(".weight")]
    layers = [layer for layer in layers if layer.endswith(BIASED_LAYERS)]
    lacking = [f"{layer}.bias" for layer in layers if f"{layer}.bias" not in state]
    if only_if_some and len(lacking) == len(layers):
        return state, []
    weights = {name: state[f"{name.removesuffix('.bias')}.weight"] for name in lacking}
    zeros = {name: weight.new_zeros(weight.shape[0]) for name, weight in weights.items()}
    return {**state, **zeros}, lacking


def hidden_width(state: dict[str, Tensor]) -> int:
    """Return the input width of the last layer of the feed-forward, of flat DINOv2 weights."""
    last = "w3" if is_swiglu(state) else "fc2"
    return state[f"blocks.0.mlp.{last}.weight"].shape[1]


def is_swiglu(state: dict[str, Tensor]) -> bool:
    """Return whether the feed-forward of flat DINOv2 weights is gated."""
    return "blocks.0.mlp.w12.weight" in state
