"""Weights under transformers' names, and the JSON files that `AutoModel.from_pretrained(FOLDER)` reads.

The names are those in which the library's own models are published; its versions 4 and 5 read them.
"""

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dinov2.errors import WeightsError
from dinov2.hub.export_layout import Layout, Normalisation, flat_weights, hidden_width, is_swiglu, with_biases
from dinov2.models.conversion import JOINED, TRANSFORMERS_BLOCK, TRANSFORMERS_ROOT, replace_start
from dinov2.models.vision_transformer import DinoVisionTransformer

ROOT = {ours: theirs for theirs, ours in TRANSFORMERS_ROOT.items()}
# Of several names for one parameter the first is that of the published models. Norms and plain feed-forwards
# have the same names in Dinov2Model as here; the others are those of ViTModel.
BLOCK = {
    ours: theirs
    for theirs, ours in reversed(TRANSFORMERS_BLOCK.items())
    if not ours.startswith(("norm", "mlp.fc"))
}
QKV = "attn.qkv."
RATIOS = range(1, 17)


def transformers_layout(model: DinoVisionTransformer, normalisation: Normalisation) -> Layout:
    """Return what transformers needs to open ``model`` as Dinov2Model or Dinov2WithRegistersModel.

    Its models always have LayerScale and all biases but that of the queries, keys and values: ones and zeros
    stand for those the model lacks, which changes no output.

    Raises:
        WeightsError: The feed-forward has a hidden width that no whole mlp_ratio leads to.
    """
    state, added = with_biases(flat_weights(model))
    notes = (
        ["transformers always has these biases, so zeros stand for those the model lacks"] if added else []
    )
    if "blocks.0.ls1.gamma" not in state:
        notes.append("transformers always has LayerScale, so gains of one stand for it")
        ones = torch.ones_like(state["norm.weight"])
        state |= {f"blocks.{i}.ls{k}.gamma": ones.clone() for i in range(model.n_blocks) for k in (1, 2)}
    renamed = {new: part for name, tensor in state.items() for new, part in _renamed(name, tensor)}
    files = {
        "config.json": _config(model, state),
        "preprocessor_config.json": _processor(model, normalisation),
    }
    return Layout(renamed, files, notes)


def _renamed(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    block = re.match(r"blocks\.(\d+)\.(.*)", name)
    if block is None:
        yield replace_start(name, ROOT), tensor
        return
    start, rest = f"encoder.layer.{block[1]}.", block[2]
    if rest.startswith(QKV):
        for part, rows in zip(JOINED[QKV], tensor.chunk(len(JOINED[QKV])), strict=True):
            yield start + BLOCK[part] + rest.removeprefix(QKV), rows
    else:
        yield start + replace_start(rest, BLOCK), tensor


def _config(model: DinoVisionTransformer, state: dict[str, Tensor]) -> dict[str, Any]:
    registers = model.num_register_tokens
    config = {
        "architectures": ["Dinov2WithRegistersModel" if registers else "Dinov2Model"],
        "model_type": "dinov2_with_registers" if registers else "dinov2",
        "hidden_size": model.embed_dim,
        "num_hidden_layers": model.n_blocks,
        "num_attention_heads": model.num_heads,
        "mlp_ratio": _whole_ratio(hidden_width(state), model.embed_dim, is_swiglu(state)),
        "hidden_act": "gelu",
        "use_swiglu_ffn": is_swiglu(state),
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "layerscale_value": 1.0,
        "layer_norm_eps": model.norm.eps,
        "image_size": model.patch_embed.img_size[0],
        "patch_size": model.patch_size,
        "num_channels": model.patch_embed.in_chans,
        "drop_path_rate": 0.0,
        "dtype": str(model.cls_token.dtype).removeprefix("torch."),
    }
    return {**config, "num_register_tokens": registers} if registers else config


def _whole_ratio(hidden: int, width: int, swiglu: bool) -> int:
    """Return the ratio from which the library computes the hidden width; it takes whole numbers only."""
    for ratio in RATIOS:
        reached = width * ratio
        if swiglu:  # two thirds, rounded up to a multiple of 8
            reached = (int(reached * 2 / 3) + 7) // 8 * 8
        if reached == hidden:
            return ratio
    raise WeightsError(
        f"transformers cannot represent these weights: its feed-forward of width {width} has no hidden width "
        f"of {hidden}, only those of a whole mlp_ratio; export to timm instead."
    )


def _processor(model: DinoVisionTransformer, normalisation: Normalisation) -> dict[str, Any]:
    size = model.patch_embed.img_size[0]
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": round(size * 256 / 224)},  # evaluation crops 224 of 256 pixels
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(normalisation.mean),
        "image_std": list(normalisation.std),
    }
