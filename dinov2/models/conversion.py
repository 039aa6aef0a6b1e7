"""Backbone weights of other layouts, brought to DINOv2's flat parameter names.

:data:`CONVERSIONS` lists the fixes in the order they are applied. Each recognises its layout by the names or
shapes of the tensors and returns anything else unchanged. Nothing is read: the values stay in their file
until the model takes them. N patches, R registers, D width.
"""

import math
import re
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2.errors import WeightsError
from dinov2.models.report import first_names
from dinov2.models.stored import StoredTensor, concatenated, derived

State = dict[str, StoredTensor]

# Parameter names of transformers' Dinov2Model and ViTModel, those of its versions 4 and 5 (the latter end in
# `_proj`). Longer names come before their own endings.
TRANSFORMERS_ROOT = {
    "embeddings.cls_token": "cls_token",
    "embeddings.mask_token": "mask_token",
    "embeddings.register_tokens": "register_tokens",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.": "patch_embed.proj.",
    "layernorm.": "norm.",
}
TRANSFORMERS_BLOCK = {
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
    "layernorm_before.": "norm1.",
    "layernorm_after.": "norm2.",
    "intermediate.dense.": "mlp.fc1.",
    "output.dense.": "mlp.fc2.",
}
# The order of the parts is that of the rows of the joined layer.
JOINED = {
    "attn.qkv.": ("attn.q.", "attn.k.", "attn.v."),
    "mlp.w12.": ("mlp.w1.", "mlp.w2."),
}
# What DINOv3 has in place of position embeddings, in the naming of its authors, timm and transformers.
_ROTARY = re.compile(r"rope|storage_tokens|\.bias_mask$|\.gamma_[12]$|^embeddings\.patch_embeddings\.weight$")


def flat_name(name: str) -> str:
    """Return a parameter name without the chunk number of ``blocks.<chunk>.<block>.``."""
    return re.sub(r"^blocks\.\d+\.(\d+\.)", r"blocks.\1", name)


def to_flat_names(state: State) -> State:
    """Convert backbone weights of any known layout to flat DINOv2 names.

    Args:
        state: Parameter name -> stored tensor, without wrapper prefixes.

    Returns:
        The converted weights; each says from which names of the file it is made, and how.

    Raises:
        WeightsError: two tensors become the same parameter.
    """
    original = {name for stored in state.values() for name in stored.names}
    for convert in CONVERSIONS:
        state = convert(state)
    lost = original - {name for stored in state.values() for name in stored.names}
    if lost:
        raise WeightsError(
            f"{len(lost)} tensors become the same parameters as others when their names are converted "
            f"({first_names(sorted(lost))}): the file mixes two layouts, or numbers its blocks anew in every "
            "chunk; keep one layout, with blocks numbered through."
        )
    return state


def to_dinov2_names(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Do what :func:`to_flat_names` does for tensors in memory.

    Returns:
        The converted weights, and for every tensor that was renamed or changed how that was done.
    """
    state = to_flat_names({name: StoredTensor.of(tensor, name) for name, tensor in tensors.items()})
    converted = {name: ", ".join(stored.how) for name, stored in state.items() if stored.how}
    return {name: stored.read() for name, stored in state.items()}, converted


def layout_of(state: Mapping[str, StoredTensor]) -> str:
    """Return in words whose layout the names of unconverted backbone weights follow."""
    names = set(state)
    if any(name.startswith("embeddings.") for name in names):
        kind = "ViTModel" if any("layernorm_before" in name for name in names) else "Dinov2Model"
        registers = "WithRegisters" if "embeddings.register_tokens" in names else ""
        return f"transformers {kind.replace('Model', registers + 'Model')}"
    if "masked_embed" in names:
        return "iBOT"
    if any(name != flat_name(name) for name in names):
        return "DINOv2, chunked"
    if "mask_token" in names:
        return "DINOv2"
    if "reg_token" in names or "blocks.0.ls1.gamma" in names:
        return "timm"
    return "timm or DINO v1 (the same names)"


def refuse_rotary_positions(state: Mapping[str, StoredTensor], source: str) -> None:
    """Raise :class:`WeightsError` for DINOv3 and its kin, whose positions this ViT cannot express."""
    has_positions = any(name.endswith(("pos_embed", "position_embeddings")) for name in state)
    marks = [name for name in state if _ROTARY.search(name)]
    if marks and not has_positions:
        raise WeightsError(
            f"The weights in {source} are those of DINOv3 or a relative of it (they have {marks[0]} and no "
            "position embeddings): it rotates queries and keys by position (RoPE) where DINOv2's ViT adds "
            "learned positions, so no conversion is possible; use DINOv2, UNI or another ViT with pos_embed."
        )


def _from_transformers(state: State) -> State:
    if not any(name.startswith("embeddings.") for name in state):
        return state
    renamed = {}
    for name, stored in state.items():
        block = re.match(r"(?:encoder\.layer|layers)\.(\d+)\.", name)
        if block:
            new = f"blocks.{block[1]}." + replace_start(name[block.end() :], TRANSFORMERS_BLOCK)
        else:
            new = replace_start(name, TRANSFORMERS_ROOT)
        renamed[new] = stored.converted("renamed from transformers") if new != name else stored
    return renamed


def replace_start(name: str, replacements: Mapping[str, str]) -> str:
    """Return ``name`` with the first of these starts that it has replaced."""
    for old, new in replacements.items():
        if name.startswith(old):
            return new + name[len(old) :]
    return name


def _flatten_chunks(state: State) -> State:
    return {
        flat_name(name): stored if name == flat_name(name) else stored.converted("chunk number dropped")
        for name, stored in state.items()
    }


def _join_projections(state: State) -> State:
    """Stack separate query, key and value layers, and the two input layers of a SwiGLU."""
    for joined, parts in JOINED.items():
        for first in [name for name in state if f".{parts[0]}" in name]:
            names = [first.replace(parts[0], part) for part in parts]
            if all(name in state for name in names):
                stacked = concatenated([state[name] for name in names], "joined from separate projections")
                state = {name: stored for name, stored in state.items() if name not in names}
                state[first.replace(parts[0], joined)] = stacked
    return state


def _rename_tokens(state: State) -> State:
    """timm calls register tokens ``reg_token``, iBOT its mask token ``masked_embed``."""
    ours = {"reg_token": "register_tokens", "masked_embed": "mask_token"}
    return {
        ours.get(name, name): stored.converted(f"renamed from {name}") if name in ours else stored
        for name, stored in state.items()
    }


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
                        stored = renamed.pop(f"{block}{old}.{kind}")
                        renamed[f"{block}{new}.{kind}"] = stored.converted(
                            "renamed from timm's packed SwiGLU"
                        )
    return renamed


def _separate_positions(state: State) -> State:
    """Bring position embeddings to cls plus patches, ``[1, 1 + N, D]``, without changing any output.

    timm stores N positions where the cls token has none: a zero is put before them. Or it stores 1 + R + N:
    the positions of the registers, which are the same for every image, become part of the register tokens.
    """
    positions, registers = state.get("pos_embed"), state.get("register_tokens")
    if positions is None or len(positions.shape) != 3 or is_square(positions.shape[1] - 1):
        return state
    _, count, width = positions.shape
    if is_square(count):
        padded = derived(
            [positions],
            (1, 1 + count, width),
            lambda stored: F.pad(stored, (0, 0, 1, 0)),
            "a zero position added for the cls token, which has none",
        )
        return {**state, "pos_embed": padded}
    extra = 0 if registers is None else registers.shape[1]
    if not (extra and is_square(count - 1 - extra)):
        return state
    how = "positions of the register tokens moved into these"
    return {
        **state,
        "pos_embed": derived(
            [positions],
            (1, count - extra, width),
            lambda stored: torch.cat([stored[:, :1], stored[:, 1 + extra :]], dim=1),
            how,
        ),
        "register_tokens": derived(
            [registers, positions],
            registers.shape,
            lambda tokens, stored: tokens + stored[:, 1 : 1 + extra],
            how,
        ),
    }


CONVERSIONS: tuple[Callable[[State], State], ...] = (
    _from_transformers,
    _flatten_chunks,
    _join_projections,
    _rename_tokens,
    _rename_packed_swiglu,
    _separate_positions,
)


def is_square(number: int) -> bool:
    """Return whether ``number`` is the square of a positive integer."""
    return number > 0 and math.isqrt(number) ** 2 == number
