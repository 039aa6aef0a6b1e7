"""Learning-rate and weight-decay multipliers of every parameter.

Layer-wise decay: the token preparation (patch embedding, positions, cls, mask and register tokens) is
layer 0, block i is layer i + 1, and everything after the blocks, heads included, is the last layer with
multiplier 1.
"""

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

# A block's index in "blocks.7.norm1.weight"; chunked models put the chunk first: "blocks.1.7.norm1.weight".
_FLAT_BLOCK = re.compile(r"(?:^|\.)blocks\.(\d+)\.")
_CHUNKED_BLOCK = re.compile(r"(?:^|\.)blocks\.\d+\.(\d+)\.")
_TOKEN_PREPARATION = ("pos_embed", "patch_embed", "mask_token", "cls_token", "register_tokens")
_FSDP_PREFIX = "_fsdp_wrapped_module."


def layer_index(name: str, num_layers: int, chunked_blocks: bool = False) -> int:
    """Return a backbone parameter's layer: 0 token preparation, i + 1 block i, num_layers + 1 the rest."""
    block = (_CHUNKED_BLOCK if chunked_blocks else _FLAT_BLOCK).search(name)
    if block:
        return int(block.group(1)) + 1
    return 0 if any(part in name for part in _TOKEN_PREPARATION) else num_layers + 1


def get_vit_lr_decay_rate(
    name: str,
    lr_decay_rate: float = 1.0,
    num_layers: int = 12,
    force_is_backbone: bool = False,
    chunked_blocks: bool = False,
) -> float:
    """Return the layer-wise learning-rate multiplier of a parameter, 0..1.

    Args:
        name: parameter name.
        lr_decay_rate: factor from a layer to the one before it, 0..1.
        num_layers: number of transformer blocks.
        force_is_backbone: treat the name as a backbone's even without the prefix ``backbone``.
        chunked_blocks: names carry a chunk number before the block's.
    """
    layer = num_layers + 1
    if force_is_backbone or name.startswith("backbone"):
        layer = layer_index(name, num_layers, chunked_blocks)
    return lr_decay_rate ** (num_layers + 1 - layer)


def count_blocks(model: nn.Module) -> tuple[int, bool]:
    """Return the number of transformer blocks (0 for a head) and whether their names are chunked."""
    if hasattr(model, "n_blocks"):
        return model.n_blocks, model.chunked_blocks
    for owner in (model, getattr(model, "backbone", None)):
        if hasattr(owner, "blocks"):
            return len(owner.blocks), False
    return 0, False


def get_params_groups_with_decay(
    model: nn.Module,
    lr_decay_rate: float = 1.0,
    patch_embed_lr_mult: float = 1.0,
    *,
    lr_mult: float = 1.0,
) -> list[dict[str, Any]]:
    """Return one group per trainable parameter, with its multipliers.

    Biases, normalisation parameters and LayerScale are not decayed; tokens, positions and the weight
    normalisation of the heads are, as DINOv2 does.

    Args:
        model: backbone or head.
        lr_decay_rate: layer-wise decay, 0..1.
        patch_embed_lr_mult: additional factor for the patch embedding.
        lr_mult: additional factor for all parameters.

    Returns:
        Dictionaries with ``params`` (a parameter), ``is_last_layer``, ``lr_multiplier``,
        ``wd_multiplier`` and ``name``, in the order of ``model.named_parameters()``.
    """
    num_blocks, chunked_blocks = count_blocks(model)
    groups = []
    for raw_name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        name = raw_name.replace(_FSDP_PREFIX, "")
        lr_multiplier = get_vit_lr_decay_rate(
            name,
            lr_decay_rate,
            num_layers=num_blocks,
            force_is_backbone=num_blocks > 0,
            chunked_blocks=chunked_blocks,
        )
        if "patch_embed" in name:
            lr_multiplier *= patch_embed_lr_mult
        lr_multiplier *= lr_mult
        is_decayed = not (name.endswith(".bias") or "norm" in name or "gamma" in name)
        groups.append(
            {
                "params": parameter,
                "is_last_layer": "last_layer" in name,
                "lr_multiplier": lr_multiplier,
                "wd_multiplier": 1.0 if is_decayed else 0.0,
                "name": name,
            }
        )
    return groups


def fuse_params_groups(
    all_params_groups: Sequence[dict[str, Any]],
    keys: Sequence[str] = ("lr_multiplier", "wd_multiplier", "is_last_layer"),
) -> list[dict[str, Any]]:
    """Join groups whose ``keys`` agree, in the order in which each combination is first seen.

    Returns:
        Groups with the ``keys`` and ``params``, a list of parameters.
    """
    fused: dict[tuple, dict[str, Any]] = {}
    for group in all_params_groups:
        values = tuple(group[key] for key in keys)
        target = fused.setdefault(values, {**dict(zip(keys, values, strict=True)), "params": []})
        target["params"].append(group["params"])
    return list(fused.values())
