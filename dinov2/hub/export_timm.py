"""Weights under timm's names, and the config.json that `timm.create_model("local-dir:FOLDER")` reads.

Everything a :class:`DinoVisionTransformer` may have exists in timm, but for the mask token.
"""

import math
from typing import Any

from torch import Tensor

from dinov2.errors import WeightsError
from dinov2.hub.export_layout import Layout, Normalisation, flat_weights, hidden_width, is_swiglu, with_biases
from dinov2.models.vision_transformer import DinoVisionTransformer

# Registered constructors whose arguments model_args replace one by one. SwiGLU is a class, which JSON cannot
# name, so such a model needs a constructor that brings it.
ARCHITECTURES = {
    192: "vit_tiny_patch16_224",
    384: "vit_small_patch14_dinov2",
    1024: "vit_large_patch14_dinov2",
}
OTHER_ARCHITECTURE = "vit_base_patch14_dinov2"
SWIGLU_ARCHITECTURE = "vit_giant_patch14_dinov2"
TIMM_NORM_EPS = 1e-6
CROP_SHARE = 224 / 256  # evaluation resizes the shorter side to 256 and crops 224


def timm_layout(model: DinoVisionTransformer, normalisation: Normalisation) -> Layout:
    """Return what timm needs to build ``model`` and to load it strictly.

    Note:
        Models with registers have no position for the cls token there. It is the same for every image, so it
        becomes part of the token, which changes no output.
    """
    state = {name: tensor for name, tensor in flat_weights(model).items() if name != "mask_token"}
    notes = ["timm has no mask token, so that of the model is left out"]
    if model.norm.eps != TIMM_NORM_EPS:
        raise WeightsError(
            f"These weights have norms with an epsilon of {model.norm.eps:g}, which timm's config.json "
            f"cannot state (its own is {TIMM_NORM_EPS:g}): export to transformers or onnx instead."
        )
    # timm has one switch for the biases of the output projection and of the feed-forward.
    state, added = with_biases(state, only_if_some=True)
    if added:
        notes.append("timm has these biases together or not at all, so zeros stand for those the model lacks")
    if model.register_tokens is not None:
        cls_position, positions = state["pos_embed"].tensor_split((1,), dim=1)
        state["cls_token"] = state["cls_token"] + cls_position
        state["pos_embed"] = positions
        state["reg_token"] = state.pop("register_tokens")
    config = _config(model, state, normalisation)
    return Layout(
        {_timm_name(name): tensor for name, tensor in state.items()}, {"config.json": config}, notes
    )


def _timm_name(name: str) -> str:
    return name.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2.")


def _config(
    model: DinoVisionTransformer, state: dict[str, Tensor], normalisation: Normalisation
) -> dict[str, Any]:
    swiglu = is_swiglu(state)
    width, size = model.embed_dim, model.patch_embed.img_size[0]
    architecture = SWIGLU_ARCHITECTURE if swiglu else ARCHITECTURES.get(width, OTHER_ARCHITECTURE)
    model_args = {
        "img_size": size,
        "patch_size": model.patch_size,
        "embed_dim": width,
        "depth": model.n_blocks,
        "num_heads": model.num_heads,
        "mlp_ratio": mlp_ratio(hidden_width(state) * (2 if swiglu else 1), width),
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "proj_bias": "blocks.0.attn.proj.bias" in state,
        "init_values": 1.0 if "blocks.0.ls1.gamma" in state else None,
        "reg_tokens": model.num_register_tokens,
        "no_embed_class": model.num_register_tokens > 0,
    }
    pretrained_cfg = {
        "architecture": architecture,
        "custom_load": False,
        "input_size": [model.patch_embed.in_chans, size, size],
        "fixed_input_size": True,
        "interpolation": "bicubic",
        "crop_pct": CROP_SHARE,
        "crop_mode": "center",
        "mean": list(normalisation.mean),
        "std": list(normalisation.std),
        "num_classes": 0,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    return {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": width,
        "global_pool": "token",
        "model_args": model_args,
        "pretrained_cfg": pretrained_cfg,
    }


def mlp_ratio(hidden: int, width: int) -> float:
    """Return a number whose product with ``width``, rounded down, is ``hidden``."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)
