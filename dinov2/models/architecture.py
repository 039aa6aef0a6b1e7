"""Which ViT a set of weights belongs to, read off names and shapes."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields

from torch import Tensor

FEED_FORWARDS = {"mlp": "fc1", "swiglufused": "w12"}  # value of student.ffn_layer -> its first layer
CONFIG_KEYS = {
    "width": "student.arch",
    "depth": "student.arch",
    "patch_size": "student.patch_size",
    "register_tokens": "student.num_register_tokens",
    "feed_forward": "student.ffn_layer",
    "layer_scale": "student.layerscale",
    "qkv_bias": "student.qkv_bias",
    "proj_bias": "student.proj_bias",
    "ffn_bias": "student.ffn_bias",
}


@dataclass(frozen=True)
class Architecture:
    """What flat DINOv2 weights say about their model; None where they say nothing."""

    width: int | None
    depth: int
    patch_size: int | None
    register_tokens: int
    feed_forward: str | None
    layer_scale: bool
    qkv_bias: bool | None
    proj_bias: bool | None
    ffn_bias: bool | None

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> "Architecture":
        """Read the architecture off weights with flat DINOv2 names."""

        def size(name: str, axis: int) -> int | None:
            return state[name].shape[axis] if name in state and state[name].ndim >= -axis else None

        def has_bias(layer: str) -> bool | None:
            return f"{layer}.bias" in state if f"{layer}.weight" in state else None

        blocks = [int(match[1]) for name in state if (match := re.match(r"blocks\.(\d+)\.", name))]
        kinds = [kind for kind, layer in FEED_FORWARDS.items() if f"blocks.0.mlp.{layer}.weight" in state]
        return cls(
            width=size("cls_token", -1),
            depth=max(blocks, default=-1) + 1,
            patch_size=size("patch_embed.proj.weight", -1),
            register_tokens=size("register_tokens", -2) or 0,
            feed_forward=kinds[0] if kinds else None,
            layer_scale="blocks.0.ls1.gamma" in state,
            qkv_bias=has_bias("blocks.0.attn.qkv"),
            proj_bias=has_bias("blocks.0.attn.proj"),
            ffn_bias=has_bias(f"blocks.0.mlp.{FEED_FORWARDS[kinds[0]]}") if kinds else None,
        )

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
