"""Transformer blocks and the sub-batch form of stochastic depth (Oquab et al. 2023, DINOv2, section 5).

Dropped samples are not computed at all: a random subset of the batch goes through the residual branch and
is added back, scaled so that the expectation of the output stays the same.

Shapes: b sequences of n tokens, s of them kept, T tokens packed, D width.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dinov2.compiled import compiled
from dinov2.layers.attention import Attention, MemEffAttention
from dinov2.layers.backend import XFORMERS_AVAILABLE, XFORMERS_ENABLED
from dinov2.layers.drop_path import DropPath
from dinov2.layers.layer_norm import LayerNorm
from dinov2.layers.layer_scale import LayerScale
from dinov2.layers.mlp import Mlp
from dinov2.layers.packing import PackedLayout
from dinov2.layers.recompute import run
from dinov2.layers.stochastic_depth import Subset, draw_subsets, kept_sequences
from dinov2.layers.swiglu_ffn import SwiGLUFFN, SwiGLUFFNAligned, SwiGLUFFNFused

__all__ = [
    "XFORMERS_AVAILABLE",
    "XFORMERS_ENABLED",
    "Block",
    "CausalAttentionBlock",
    "NestedTensorBlock",
    "add_residual",
    "attn_bias_cache",
    "drop_add_residual_stochastic_depth",
    "drop_add_residual_stochastic_depth_list",
    "get_attn_bias_and_cat",
    "get_branges_scales",
]

# Below this rate a subset saves less than its gather and scatter cost; such blocks mask samples instead.
SUBSET_MIN_RATE = 0.1

# What can have LayerScale done by its last layer. A class derived from one may have another forward.
TAKE_SCALE = Attention, MemEffAttention, Mlp, SwiGLUFFN, SwiGLUFFNFused, SwiGLUFFNAligned

attn_bias_cache: dict[tuple[tuple[int, int], ...], PackedLayout] = {}


class Block(nn.Module):
    """``x + drop(ls1(attn(norm1 x)))``, then ``x + drop(ls2(mlp(norm2 x)))``.

    Args:
        dim: token width D.
        num_heads: attention heads.
        mlp_ratio: hidden width of the feed-forward as a multiple of ``dim``.
        qkv_bias, proj_bias, ffn_bias: biases of the three groups of linear layers.
        drop: dropout probability of the projections.
        attn_drop: dropout probability of attention weights.
        init_values: initial LayerScale gain; None or 0 for no LayerScale.
        drop_path: stochastic depth rate, 0..1.
        act_layer, norm_layer, attn_class, ffn_layer: what the block is made of.
    """

    # A key of dinov2.layers.recompute.MODES; may be set per module. The block itself recomputes, inside its
    # forward, so that hooks on it (FSDP's) run once in each direction.
    recompute = "none"
    # Whether packed batches run through torch.compile, see set_compiled.
    compiled = False

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        proj_bias: bool = True,
        ffn_bias: bool = True,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        init_values: float | Tensor | None = None,
        drop_path: float = 0.0,
        act_layer: Callable[..., nn.Module] = nn.GELU,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        attn_class: Callable[..., nn.Module] = Attention,
        ffn_layer: Callable[..., nn.Module] = Mlp,
    ) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = attn_class(
            dim, num_heads, qkv_bias=qkv_bias, proj_bias=proj_bias, attn_drop=attn_drop, proj_drop=drop
        )
        self.ls1 = _layer_scale(dim, init_values)
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = norm_layer(dim)
        hidden = int(dim * mlp_ratio)
        self.mlp = ffn_layer(
            in_features=dim, hidden_features=hidden, act_layer=act_layer, drop=drop, bias=ffn_bias
        )
        self.ls2 = _layer_scale(dim, init_values)
        self.drop_path2 = DropPath(drop_path)
        self.sample_drop_ratio = drop_path

    def set_compiled(self, wanted: bool = True) -> None:
        """Let packed batches run through torch.compile, or not."""
        for module in self.modules():
            if isinstance(module, (Block, LayerNorm)):
                module.compiled = wanted

    def attention_branch(
        self, x: Tensor, attn_bias: PackedLayout | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """First residual branch, on ``[b, n, D]`` or packed ``[1, T, D]`` with its layout and wanted rows."""
        packed = {} if attn_bias is None else {"attn_bias": attn_bias, "rows": rows}
        return _scaled(self.attn, self.ls1, self.norm1(x), **packed)

    def ffn_branch(self, x: Tensor, attn_bias: PackedLayout | None = None) -> Tensor:
        """Second residual branch; token by token, so it needs no layout."""
        return _scaled(self.mlp, self.ls2, self.norm2(x))

    def forward(self, x: Tensor) -> Tensor:
        """Transform ``[b, n, D]``."""
        return run(self.recompute, self._forward_batch, x)

    def _forward_batch(self, x: Tensor) -> Tensor:
        if self.training and self.sample_drop_ratio > SUBSET_MIN_RATE:
            for branch in (self.attention_branch, self.ffn_branch):
                x = drop_add_residual_stochastic_depth(x, branch, self.sample_drop_ratio)
            return x
        x = x + self.drop_path1(self.attention_branch(x))
        return x + self.drop_path2(self.ffn_branch(x))


class NestedTensorBlock(Block):
    """:class:`Block` that also takes batches of different sequence lengths at once."""

    def forward(
        self,
        x_or_x_list: Tensor | list[Tensor],
        layout: PackedLayout | None = None,
        rows: Sequence[Tensor] | None = None,
        subsets: Sequence[Subset] | None = None,
    ) -> Tensor | list[Tensor]:
        """Transform one batch, a list of batches, or packed batches.

        Args:
            x_or_x_list: ``[b, n, D]``, a list of such, or packed ``[1, T, D]`` together with ``layout``.
            layout: how the packed tensor divides. A model packs once before its blocks and splits once after
                them; a block that returned views of a list would defeat FSDP's hooks.
            rows: per packed batch, positions ``[k]`` in its flattened tokens ``[b * n]``: transform these
                alone, though they see all others.
            subsets: of packed batches, what goes through each branch, see :meth:`drop_rates`; by default
                drawn here.

        Returns:
            The same structure as the input; with ``rows`` ``[1, K, D]``, theirs of all batches.
        """
        if layout is None and isinstance(x_or_x_list, Tensor):
            return super().forward(x_or_x_list)
        if layout is None:
            layout, packed = get_attn_bias_and_cat(x_or_x_list)
            return layout.split(self.forward(packed, layout))
        if subsets is None:
            subsets = draw_subsets(layout, self.drop_rates(), x_or_x_list.device)
        if rows is None:
            return run(self.recompute, self._function(_transform), self, x_or_x_list, layout, subsets)
        chosen = torch.cat(layout.packed_rows(rows))
        return run(
            self.recompute, self._function(_transform_rows), self, x_or_x_list, layout, subsets, chosen
        )

    def drop_rates(self) -> list[float]:
        """Return how much of packed batches each branch leaves out; nothing if both take all of them."""
        dropping = self.training and self.sample_drop_ratio > 0.0
        return [self.sample_drop_ratio] * 2 if dropping else []

    def _function(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return compiled(function) if self.compiled else function


def run_blocks(
    planned: Iterable[tuple[nn.Module, Sequence[Subset]]], x: Tensor, layout: PackedLayout
) -> Tensor:
    """Apply blocks, or chunks of them, one after the other to packed ``x``, each with its subsets."""
    for block, subsets in planned:
        x = block(x, layout, subsets=subsets)
    return x


def _transform(block: Block, x: Tensor, layout: PackedLayout, subsets: Sequence[Subset]) -> Tensor:
    """Apply a block to packed ``x``, its branches to their subsets."""
    if not subsets:
        x = x + block.attention_branch(x, layout)
        return x + block.ffn_branch(x)
    first, second = subsets
    x = first.add(x, block.attention_branch(first.take(x), first.layout))
    return second.add(x, block.ffn_branch(second.take(x)))


def _transform_rows(
    block: Block, x: Tensor, layout: PackedLayout, subsets: Sequence[Subset], rows: Tensor
) -> Tensor:
    """Return what :func:`_transform` does, at packed positions ``rows`` ``[K]`` alone."""
    out = x.index_select(1, rows)
    if not subsets:
        out = out + block.attention_branch(x, layout, rows)
        return out + block.ffn_branch(out)
    first, second = subsets
    # Of sequences left out any token is computed and counts nothing: shapes do not depend on what was drawn.
    at, weights = first.place.index_select(0, rows), first.weights.index_select(0, rows)
    out = out + weights * block.attention_branch(x.index_select(1, first.rows), first.layout, at)
    return out + second.weights.index_select(0, rows) * block.ffn_branch(out)


class CausalAttentionBlock(nn.Module):
    """Pre-norm block with (by default) causal attention, for text.

    Args:
        dim: token width D.
        num_heads: attention heads.
        ffn_ratio: hidden width of the feed-forward as a multiple of ``dim``.
        ls_init_value: initial LayerScale gain; None or 0 for no LayerScale.
        is_causal: let each token see only itself and earlier ones.
        act_layer, norm_layer: what the block is made of.
        dropout_prob: dropout probability of attention weights and projections.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        ffn_ratio: float = 4.0,
        ls_init_value: float | None = None,
        is_causal: bool = True,
        act_layer: Callable[..., nn.Module] = nn.GELU,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        dropout_prob: float = 0.0,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.is_causal = is_causal
        self.ls1 = _layer_scale(dim, ls_init_value)
        self.attention_norm = norm_layer(dim)
        self.attention = Attention(dim, num_heads, attn_drop=dropout_prob, proj_drop=dropout_prob)
        self.ffn_norm = norm_layer(dim)
        self.feed_forward = Mlp(dim, int(dim * ffn_ratio), act_layer=act_layer, drop=dropout_prob)
        self.ls2 = _layer_scale(dim, ls_init_value)

    def init_weights(
        self,
        init_attn_std: float | None = None,
        init_proj_std: float | None = None,
        init_fc_std: float | None = None,
        factor: float = 1.0,
    ) -> None:
        """Draw normal weights; by default std ``dim**-0.5``, times ``factor`` where a branch ends."""
        attn_std = self.dim**-0.5 if init_attn_std is None else init_attn_std
        proj_std = attn_std * factor if init_proj_std is None else init_proj_std
        fc_std = (2 * self.dim) ** -0.5 if init_fc_std is None else init_fc_std
        self.attention.init_weights(attn_std, proj_std)
        nn.init.normal_(self.feed_forward.fc1.weight, std=fc_std)
        nn.init.normal_(self.feed_forward.fc2.weight, std=proj_std)
        self.attention_norm.reset_parameters()
        self.ffn_norm.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Transform ``[b, n, D]``."""
        x = x + self.ls1(self.attention(self.attention_norm(x), self.is_causal))
        return x + self.ls2(self.feed_forward(self.ffn_norm(x)))


def _scaled(branch: nn.Module, scale: nn.Module, x: Tensor, **options: Any) -> Tensor:
    """Return ``scale(branch(x))``, by the branch itself if it can."""
    if type(branch) in TAKE_SCALE:
        return branch(x, scale=scale, **options)
    return scale(branch(x, **options))


def _layer_scale(dim: int, init_values: float | Tensor | None) -> nn.Module:
    wanted = isinstance(init_values, Tensor) or bool(init_values)
    return LayerScale(dim, init_values=init_values) if wanted else nn.Identity()


def get_branges_scales(x: Tensor, sample_drop_ratio: float = 0.0) -> tuple[Tensor, float]:
    """Choose which of the b samples of ``x`` go through a branch.

    Returns:
        Indices ``[s]`` with ``s = max(int(b * (1 - sample_drop_ratio)), 1)``, and the factor ``b / s`` that
        keeps the expectation of the branch.
    """
    batch = x.shape[0]
    kept = kept_sequences(batch, sample_drop_ratio)
    return torch.randperm(batch, device=x.device)[:kept], batch / kept


def add_residual(
    x: Tensor,
    brange: Tensor,
    residual: Tensor,
    residual_scale_factor: float,
    scaling_vector: Tensor | None = None,
) -> Tensor:
    """Return ``x`` with ``residual``, scaled, added to its rows ``brange``."""
    if scaling_vector is not None:
        residual = residual * scaling_vector
    return x.index_add(0, brange, residual.to(x.dtype), alpha=residual_scale_factor)


def drop_add_residual_stochastic_depth(
    x: Tensor, residual_func: Callable[[Tensor], Tensor], sample_drop_ratio: float = 0.0
) -> Tensor:
    """Add a residual branch computed for a random subset of the samples of ``x`` (``[b, n, D]``)."""
    brange, scale = get_branges_scales(x, sample_drop_ratio)
    return add_residual(x, brange, residual_func(x.index_select(0, brange)), scale)


def get_attn_bias_and_cat(
    x_list: Sequence[Tensor], branges: Sequence[Tensor] | None = None
) -> tuple[PackedLayout, Tensor]:
    """Pack batches ``[b, n, D]``, or only their samples ``branges``, into one ``[1, T, D]``.

    Returns:
        The layout, which keeps attention within each sequence, and the packed tensor.
    """
    if branges is not None:
        x_list = [x.index_select(0, brange) for x, brange in zip(x_list, branges, strict=True)]
    layout = PackedLayout.of(x_list)
    layout = attn_bias_cache.setdefault(layout.shapes, layout)
    return layout, layout.pack(x_list)


def drop_add_residual_stochastic_depth_list(
    x_list: Sequence[Tensor],
    residual_func: Callable[..., Tensor],
    sample_drop_ratio: float = 0.0,
    scaling_vector: Tensor | None = None,
) -> list[Tensor]:
    """:func:`drop_add_residual_stochastic_depth` for several batches, their subsets computed together.

    Args:
        x_list: batches ``[b, n, D]``.
        residual_func: called as ``residual_func(packed, attn_bias=layout)``.
        sample_drop_ratio: share of every batch to leave out, 0..1.
        scaling_vector: LayerScale gain ``[D]`` applied to the branch.
    """
    layout, packed = get_attn_bias_and_cat(x_list)
    return layout.split(_drop_add_packed(packed, layout, residual_func, sample_drop_ratio, scaling_vector))


def _drop_add_packed(
    x: Tensor,
    layout: PackedLayout,
    residual_func: Callable[..., Tensor],
    sample_drop_ratio: float,
    scaling_vector: Tensor | None = None,
) -> Tensor:
    """Add a branch computed for a subset of every batch of packed ``x``: one gather, one branch."""
    (subset,) = draw_subsets(layout, [sample_drop_ratio], x.device)
    residual = residual_func(subset.take(x), attn_bias=subset.layout)
    if scaling_vector is not None:
        residual = residual * scaling_vector
    return subset.add(x, residual)
