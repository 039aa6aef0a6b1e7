"""Which ViT a set of weights belongs to, read off names and shapes, and the config that builds it."""

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Protocol

from dinov2.errors import WeightsError
from dinov2.models.vision_transformer import SIZES

FEED_FORWARDS = {"mlp": "fc1", "swiglufused": "w12"}  # value of student.ffn_layer -> its first layer
CONFIG_KEYS = {
    "width": "student.arch",
    "depth": "student.arch",
    "num_heads": "student.num_heads",
    "patch_size": "student.patch_size",
    "register_tokens": "student.num_register_tokens",
    "feed_forward": "student.ffn_layer",
    "feed_forward_width": "student.mlp_ratio",
    "layer_scale": "student.layerscale",
    "qkv_bias": "student.qkv_bias",
    "proj_bias": "student.proj_bias",
    "ffn_bias": "student.ffn_bias",
}
# Attention heads leave no trace in the weights. These are those of every published ViT of the width, among
# them ViT-H (Virchow), whose heads are 80 wide.
USUAL_HEADS = {width: heads for width, _, heads in SIZES.values()} | {1280: 16}
USUAL_MLP_RATIO = 4
INITIAL_LAYER_SCALE = 1e-5  # only says that there is LayerScale: the values come from the weights


class Shaped(Protocol):
    """A tensor, in memory or in its file."""

    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Architecture:
    """What flat DINOv2 weights say about their model; None where they say nothing."""

    width: int | None
    depth: int
    patch_size: int | None
    register_tokens: int
    feed_forward: str | None
    feed_forward_width: int | None
    layer_scale: bool
    qkv_bias: bool | None
    proj_bias: bool | None
    ffn_bias: bool | None
    num_heads: int | None = None

    @classmethod
    def of(cls, state: Mapping[str, Shaped], num_heads: int | None = None) -> "Architecture":
        """Read the architecture off weights with flat DINOv2 names.

        Args:
            state: Parameter name -> tensor.
            num_heads: Attention heads, where something beside the weights tells them.
        """

        def size(name: str, axis: int) -> int | None:
            return state[name].shape[axis] if name in state and len(state[name].shape) >= -axis else None

        def has_bias(layer: str) -> bool | None:
            return f"{layer}.bias" in state if f"{layer}.weight" in state else None

        blocks = [int(match[1]) for name in state if (match := re.match(r"blocks\.(\d+)\.", name))]
        kinds = [kind for kind, layer in FEED_FORWARDS.items() if f"blocks.0.mlp.{layer}.weight" in state]
        kind = kinds[0] if kinds else None
        hidden = size(f"blocks.0.mlp.{FEED_FORWARDS[kind]}.weight", -2) if kind else None
        return cls(
            width=size("cls_token", -1),
            depth=max(blocks, default=-1) + 1,
            patch_size=size("patch_embed.proj.weight", -1),
            register_tokens=size("register_tokens", -2) or 0,
            feed_forward=kind,
            feed_forward_width=hidden // 2 if hidden and kind == "swiglufused" else hidden,
            layer_scale="blocks.0.ls1.gamma" in state,
            qkv_bias=has_bias("blocks.0.attn.qkv"),
            proj_bias=has_bias("blocks.0.attn.proj"),
            ffn_bias=has_bias(f"blocks.0.mlp.{FEED_FORWARDS[kind]}") if kind else None,
            num_heads=num_heads,
        )

    def with_heads(self, num_heads: int | None) -> "Architecture":
        """Return a copy with that many attention heads."""
        return dataclasses.replace(self, num_heads=num_heads)

    def without(self, *names: str) -> "Architecture":
        """Return a copy that says nothing about some fields, so that they are not compared."""
        return dataclasses.replace(self, **dict.fromkeys(names))

    def differences(self, model: "Architecture") -> list[str]:
        """Return a phrase for every field in which these weights and a model's are known to differ."""
        phrases = []
        for field in fields(self):
            mine, others = getattr(self, field.name), getattr(model, field.name)
            if mine != others and mine is not None and others is not None:
                words = field.name.replace("_", " ")
                key = CONFIG_KEYS[field.name]
                phrases.append(f"{words} is {mine} in the weights and {others} in the model ({key})")
        return phrases

    def describe(self) -> str:
        """Return the architecture in one line, e.g. for a log."""
        parts = [f"width {self.width}, {self.depth} blocks, {self.num_heads or 'unknown'} heads"]
        parts.append(f"patch {self.patch_size} px, {self.register_tokens} registers")
        parts.append(f"{self.feed_forward or 'no'} feed-forward of {self.feed_forward_width}")
        parts.append("LayerScale" if self.layer_scale else "no LayerScale")
        biases = {"qkv": self.qkv_bias, "proj": self.proj_bias, "ffn": self.ffn_bias}
        parts.append("biases: " + (", ".join(name for name, has in biases.items() if has) or "none"))
        return "; ".join(parts)

    def student_options(self, source: str) -> dict[str, Any]:
        """Return the values of the ``student`` config section that build this architecture.

        Raises:
            WeightsError: the weights are no ViT, or something that they do not tell is needed.
        """
        if not (self.width and self.depth and self.patch_size and self.feed_forward):
            raise WeightsError(
                f"The weights in {source} do not look like a vision transformer: expected at least "
                "cls_token, patch_embed.proj.weight and blocks with a feed-forward layer."
            )
        arch, own_depth, own_heads = self._nearest_named()
        heads = self.num_heads or USUAL_HEADS.get(self.width)
        if heads is None:
            raise WeightsError(
                f"The weights in {source} have the width {self.width}, for which the number of attention "
                "heads is not known and cannot be read off the weights: set student.num_heads."
            )
        return {
            "arch": arch,
            "embed_dim": None if self.width == SIZES[arch][0] else self.width,
            "depth": None if self.depth == own_depth else self.depth,
            "num_heads": None if heads == own_heads else heads,
            "mlp_ratio": self._mlp_ratio(source),
            "patch_size": self.patch_size,
            "num_register_tokens": self.register_tokens,
            "ffn_layer": self.feed_forward,
            "layerscale": INITIAL_LAYER_SCALE if self.layer_scale else None,
            "qkv_bias": bool(self.qkv_bias),
            "proj_bias": bool(self.proj_bias),
            "ffn_bias": bool(self.ffn_bias),
        }

    def _nearest_named(self) -> tuple[str, int, int]:
        """Return the named architecture of this width, else ``vit_large``, with its depth and heads."""
        by_width = {width: name for name, (width, _, _) in SIZES.items()}
        name = by_width.get(self.width, "vit_large")
        return name, *SIZES[name][1:]

    def _mlp_ratio(self, source: str) -> float | None:
        """Return the ratio that gives the stored hidden width, None for the usual one."""
        ratio = self.feed_forward_width / self.width
        if self.feed_forward == "swiglufused":  # two thirds, rounded up to a multiple of 8
            if self.feed_forward_width == math.ceil(int(self.width * USUAL_MLP_RATIO * 2 / 3) / 8) * 8:
                return None
            if self.feed_forward_width % 8:
                raise WeightsError(
                    f"The weights in {source} have a SwiGLU feed-forward of width {self.feed_forward_width}: "
                    "only multiples of 8 can be built."
                )
            return ratio * 1.5
        # Rounded up by a hair: the model multiplies and rounds down, which may otherwise miss by one.
        return None if ratio == USUAL_MLP_RATIO else math.nextafter(ratio, math.inf)
