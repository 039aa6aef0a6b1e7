"""Backbone weights of other layouts, brought to DINOv2's flat parameter names and to a model's grid.

:data:`CONVERSIONS` lists the fixes in the order they are applied. Each recognises its layout by the names or
shapes of the tensors and returns anything else unchanged. N patches, R registers, D width.
"""

import math
import re
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]

# Parameter names of transformers' Dinov2Model, those of its versions 4 and 5 (the latter end in `_proj`).
_TRANSFORMERS_ROOT = {
    "embeddings.cls_token": "cls_token",
    "embeddings.mask_token": "mask_token",
    "embeddings.register_tokens": "register_tokens",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.": "patch_embed.proj.",
    "layernorm.": "norm.",
}
_TRANSFORMERS_BLOCK = {
    "attention.attention.query.": "attn.q.",
    "attention.attention.key.": "attn.k.",
    "attention.attention.value.": "attn.v.",
    "attention.output.dense.": "attn.proj.",
    "attention.q_proj.": "attn.q.",
    "attention.k_proj.": "attn.k.",
    "attention.v_proj.": "attn.v.",
    "attention.o_proj.": "attn.proj.",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
    "mlp.weights_in.": "mlp.w12.",
    "mlp.weights_out.": "mlp.w3.",
    "mlp.gate_proj.": "mlp.w1.",
    "mlp.up_proj.": "mlp.w2.",
    "mlp.down_proj.": "mlp.w3.",
}
# The order of the parts is that of the rows of the joined layer.
_JOINED = {
    "attn.qkv.": ("attn.q.", "attn.k.", "attn.v."),
    "mlp.w12.": ("mlp.w1.", "mlp.w2."),
}


def flat_name(name: str) -> str:
    """Return a parameter name without the chunk number of ``blocks.<chunk>.<block>.``."""
    return re.sub(r"^blocks\.\d+\.(\d+\.)", r"blocks.\1", name)


def to_dinov2_names(state: Mapping[str, Tensor]) -> tuple[State, dict[str, str]]:
    """Convert backbone weights of any known layout to flat DINOv2 names.

    Args:
        state: Parameter name -> tensor, without wrapper prefixes.

    Returns:
        The converted weights, and for every tensor that was renamed or changed how that was done.
    """
    current, converted = dict(state), {}
    for how, convert in CONVERSIONS.items():
        previous, current = current, convert(current)
        changed = [name for name, tensor in current.items() if tensor is not previous.get(name)]
        for name in changed:
            converted[name] = f"{converted[name]}, {how}" if name in converted else how
    return current, {name: how for name, how in converted.items() if name in current}


def _from_transformers(state: State) -> State:
    if not any(name.startswith("embeddings.") for name in state):
        return state
    renamed = {}
    for name, tensor in state.items():
        block = re.match(r"encoder\.layer\.(\d+)\.", name)
        if block:
            name = f"blocks.{block[1]}." + _replace_start(name[block.end() :], _TRANSFORMERS_BLOCK)
        else:
            name = _replace_start(name, _TRANSFORMERS_ROOT)
        renamed[name] = tensor
    return renamed


def _replace_start(name: str, replacements: Mapping[str, str]) -> str:
    for old, new in replacements.items():
        if name.startswith(old):
            return new + name[len(old) :]
    return name


def _flatten_chunks(state: State) -> State:
    return {flat_name(name): tensor for name, tensor in state.items()}


def _join_projections(state: State) -> State:
    """Stack separate query, key and value layers, and the two input layers of a SwiGLU."""
    for joined, parts in _JOINED.items():
        for first in [name for name in state if f".{parts[0]}" in name]:
            names = [first.replace(parts[0], part) for part in parts]
            if all(name in state for name in names):
                stacked = torch.cat([state[name] for name in names])
                state = {name: tensor for name, tensor in state.items() if name not in names}
                state[first.replace(parts[0], joined)] = stacked
    return state


def _rename_timm_registers(state: State) -> State:
    return {"register_tokens" if name == "reg_token" else name: tensor for name, tensor in state.items()}


def _rename_packed_swiglu(state: State) -> State:
    """timm keeps SwiGLU under the names of a plain MLP; ``fc1`` is then twice as wide as ``fc2``'s input."""
    renamed = dict(state)
    for name in state:
        block = name.removesuffix("fc1.weight")
        fc2 = state.get(f"{block}fc2.weight")
        if block != name and fc2 is not None and state[name].shape[0] == 2 * fc2.shape[-1]:
            for old, new in (("fc1", "w12"), ("fc2", "w3")):
                for kind in ("weight", "bias"):
                    if f"{block}{old}.{kind}" in renamed:
                        renamed[f"{block}{new}.{kind}"] = renamed.pop(f"{block}{old}.{kind}")
    return renamed


def _separate_positions(state: State) -> State:
    """Bring position embeddings to cls plus patches, ``[1, 1 + N, D]``, without changing any output.

    timm stores N positions where the cls token has none: a zero is put before them. Or it stores 1 + R + N:
    the positions of the registers, which are the same for every image, become part of the register tokens.
    """
    positions, registers = state.get("pos_embed"), state.get("register_tokens")
    if positions is None or positions.ndim != 3 or is_square(positions.shape[1] - 1):
        return state
    if is_square(positions.shape[1]):
        return {**state, "pos_embed": F.pad(positions, (0, 0, 1, 0))}
    count = 0 if registers is None else registers.shape[1]
    if count and is_square(positions.shape[1] - 1 - count):
        cls_position, register_positions, patch_positions = positions.tensor_split((1, 1 + count), dim=1)
        return {
            **state,
            "pos_embed": torch.cat([cls_position, patch_positions], dim=1),
            "register_tokens": registers + register_positions,
        }
    return state


CONVERSIONS: dict[str, Callable[[State], State]] = {
    "renamed from transformers": _from_transformers,
    "chunk number dropped": _flatten_chunks,
    "joined from separate projections": _join_projections,
    "renamed from timm's reg_token": _rename_timm_registers,
    "renamed from timm's packed SwiGLU": _rename_packed_swiglu,
    "positions of cls and register tokens separated": _separate_positions,
}


def is_square(number: int) -> bool:
    """Return whether ``number`` is the square of a positive integer."""
    return number > 0 and math.isqrt(number) ** 2 == number
