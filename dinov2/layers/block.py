"""Transformer blocks and the sub-batch form of stochastic depth (Oquab et al. 2023, DINOv2, section 5).

Dropped samples are not computed at all: a random subset of the batch goes through the residual branch and
is added back, scaled so that the expectation of the output stays the same.

Shapes: b sequences of n tokens, s of them kept, T tokens packed, D width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dinov2.layers.attention import Attention
from dinov2.layers.backend import XFORMERS_AVAILABLE, XFORMERS_ENABLED
from dinov2.layers.drop_path import DropPath
from dinov2.layers.layer_scale import LayerScale
from dinov2.layers.mlp import Mlp
from dinov2.layers.packing import PackedLayout
from dinov2.layers.recompute import run

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

    def attention_branch(
        self, x: Tensor, attn_bias: PackedLayout | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """First residual branch, on ``[b, n, D]`` or packed ``[1, T, D]`` with its layout and wanted rows."""
        x = self.norm1(x)
        return self.ls1(self.attn(x) if attn_bias is None else self.attn(x, attn_bias=attn_bias, rows=rows))

    def ffn_branch(self, x: Tensor, attn_bias: PackedLayout | None = None) -> Tensor:
        """Second residual branch; token by token, so it needs no layout."""
        return self.ls2(self.mlp(self.norm2(x)))

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
    ) -> Tensor | list[Tensor]:
        """Transform one batch, a list of batches, or packed batches.

        Args:
            x_or_x_list: ``[b, n, D]``, a list of such, or packed ``[1, T, D]`` together with ``layout``.
            layout: how the packed tensor divides. A model packs once before its blocks and splits once after
                them; a block that returned views of a list would defeat FSDP's hooks.
            rows: per packed batch, positions ``[k]`` in its flattened tokens ``[b * n]``: transform these
                alone, though they see all others.

        Returns:
            The same structure as the input; with ``rows`` ``[1, K, D]``, theirs of all batches.
        """
        if rows is not None:
            return run(self.recompute, self._forward_rows, x_or_x_list, layout, *rows)
        if layout is not None:
            return run(self.recompute, self._forward_packed, x_or_x_list, layout)
        if isinstance(x_or_x_list, Tensor):
            return super().forward(x_or_x_list)
        layout, packed = get_attn_bias_and_cat(x_or_x_list)
        return layout.split(run(self.recompute, self._forward_packed, packed, layout))

    def _forward_packed(self, x: Tensor, layout: PackedLayout) -> Tensor:
        for branch in (self.attention_branch, self.ffn_branch):
            if self.training and self.sample_drop_ratio > 0.0:
                x = _drop_add_packed(x, layout, branch, self.sample_drop_ratio)
            else:
                x = x + branch(x, layout)
        return x

    def _forward_rows(self, x: Tensor, layout: PackedLayout, *rows: Tensor) -> Tensor:
        chosen = torch.cat(layout.packed_rows(rows))
        out = x.index_select(1, chosen)
        rate = self.sample_drop_ratio if self.training else 0.0
        if rate == 0.0:
            out = out + self.attention_branch(x, layout, chosen)
            return out + self.ffn_branch(out)
        subset = _Subset.draw(x, layout, rate)
        kept = x.index_select(1, torch.cat(subset.tokens))
        weights, at = subset.find(rows)
        out = out + weights * self.attention_branch(kept, subset.layout, at)
        weights, _ = _Subset.draw(x, layout, rate).find(rows)
        return out + weights * self.ffn_branch(out)


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
    kept = max(int(batch * (1 - sample_drop_ratio)), 1)
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
    subset = _Subset.draw(x, layout, sample_drop_ratio)
    residual = residual_func(x.index_select(1, torch.cat(subset.tokens)), attn_bias=subset.layout)
    if scaling_vector is not None:
        residual = residual * scaling_vector
    return _AddAt.apply(x, residual, subset.tokens, subset.scales)


class _AddAt(torch.autograd.Function):
    """Add parts of a packed tensor, scaled, at rows of another.

    ``index_add`` would keep the parts for its backward pass, though no gradient depends on them: 16 % of what
    a block keeps in half precision.
    """

    @staticmethod
    def forward(ctx, x: Tensor, residual: Tensor, rows: list[Tensor], scales: tuple[float, ...]) -> Tensor:
        ctx.save_for_backward(*rows)
        ctx.scales, ctx.dtype = scales, residual.dtype
        out = x.clone()
        parts = residual.to(x.dtype).split([len(index) for index in rows], dim=1)
        for index, part, scale in zip(rows, parts, scales, strict=True):
            out.index_add_(1, index, part, alpha=scale)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        parts = [
            grad.index_select(1, index).mul_(scale)
            for index, scale in zip(ctx.saved_tensors, ctx.scales, strict=True)
        ]
        return grad, torch.cat(parts, dim=1).to(ctx.dtype), None, None


@dataclass(frozen=True)
class _Subset:
    """The sequences of every packed batch that go through a branch.

    Attributes:
        whole: layout of all sequences.
        layout: of those kept.
        samples: per batch, the kept sequences ``[s]``.
        tokens: per batch, the packed positions ``[s * n]`` of their tokens.
        scales: per batch, what keeps the expectation of the branch.
    """

    whole: PackedLayout
    layout: PackedLayout
    samples: tuple[Tensor, ...]
    tokens: list[Tensor]
    scales: tuple[float, ...]

    @classmethod
    def draw(cls, x: Tensor, layout: PackedLayout, sample_drop_ratio: float) -> "_Subset":
        """Choose from packed ``x``."""
        samples, scales = zip(
            *(get_branges_scales(batch, sample_drop_ratio) for batch in layout.split(x)), strict=True
        )
        kept = tuple((len(brange), n) for brange, (_, n) in zip(samples, layout.shapes, strict=True))
        return cls(layout, PackedLayout(kept), samples, layout.token_rows(samples), scales)

    def find(self, rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return what the branch counts at chosen tokens, and where they are among the kept ones.

        Args:
            rows: per batch, positions ``[k]`` in its flattened tokens ``[b * n]``.

        Returns:
            ``[K, 1]`` the batch's scale, 0 for tokens of sequences left out; and ``[K]`` positions among the
            kept tokens, any for those left out, so that shapes do not depend on what was drawn.
        """
        weights, found = [], []
        batches = zip(self.whole.shapes, self.samples, self.scales, strict=True)
        for (count, n), samples, scale in batches:
            place = torch.full((count,), -1, device=samples.device)
            place[samples] = torch.arange(len(samples), device=samples.device)
            chosen = rows[len(found)]
            of_sequence = place[chosen // n]
            weights.append((of_sequence >= 0) * scale)
            found.append(of_sequence.clamp_min(0) * n + chosen % n)
        return torch.cat(weights)[:, None], torch.cat(self.layout.packed_rows(found))
