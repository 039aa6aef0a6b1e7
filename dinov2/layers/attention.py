"""Multi-head self-attention (Dosovitskiy et al. 2021, section 3.1) over one batch or over packed batches."""

from torch import Tensor, nn

from dinov2.errors import ConfigError
from dinov2.layers.backend import XFORMERS_AVAILABLE, XFORMERS_ENABLED, attend
from dinov2.layers.layer_scale import scaled_linear
from dinov2.layers.packing import PackedLayout

__all__ = ["XFORMERS_AVAILABLE", "XFORMERS_ENABLED", "Attention", "MemEffAttention"]


class Attention(nn.Module):
    """Self-attention with one joint projection to queries, keys and values.

    Args:
        dim: token width D, a multiple of ``num_heads``.
        num_heads: attention heads.
        qkv_bias: bias on the joint projection.
        proj_bias: bias on the output projection.
        attn_drop: dropout probability of attention weights, honoured by every backend.
        proj_drop: dropout probability after the output projection.

    Raises:
        ConfigError: ``dim`` is not a multiple of ``num_heads``.
    """

    backend = "auto"  # see dinov2.layers.backend.attend; may be set per class or per module

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ConfigError(
                f"a width of {dim} cannot be shared by {num_heads} attention heads; "
                "choose num_heads that divides embed_dim"
            )
        self.dim = dim
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.attn_drop = attn_drop
        self.proj = nn.Linear(dim, dim, bias=proj_bias)
        self.proj_drop = nn.Dropout(proj_drop)

    def init_weights(
        self, init_attn_std: float | None = None, init_proj_std: float | None = None, factor: float = 1.0
    ) -> None:
        """Draw normal weights: std ``dim**-0.5`` for qkv, that times ``factor`` for proj; zero biases."""
        attn_std = self.dim**-0.5 if init_attn_std is None else init_attn_std
        proj_std = attn_std * factor if init_proj_std is None else init_proj_std
        for layer, std in ((self.qkv, attn_std), (self.proj, proj_std)):
            nn.init.normal_(layer.weight, std=std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(
        self,
        x: Tensor,
        is_causal: bool = False,
        *,
        attn_bias: PackedLayout | None = None,
        rows: Tensor | None = None,
        scale: nn.Module | None = None,
    ) -> Tensor:
        """Mix tokens within each sequence.

        Args:
            x: ``[B, N, D]``, or packed ``[1, T, D]`` together with its layout.
            is_causal: let each token see only itself and earlier ones.
            attn_bias: layout of a packed ``x``; sequences never see each other.
            rows: positions ``[k]`` of a packed ``x`` whose results are wanted; by default all.
            scale: LayerScale of the result.

        Returns:
            Same shape as ``x``, or ``[1, k, D]``.
        """
        qkv = self.qkv(x)
        if attn_bias is None:
            mixed = self._mix(qkv, is_causal)
        else:
            mixed = attn_bias.pack([self._mix(part, is_causal) for part in attn_bias.split(qkv)])
        if rows is not None:
            mixed = mixed.index_select(1, rows)
        return self.proj_drop(scaled_linear(self.proj, scale, mixed))

    def _mix(self, qkv: Tensor, is_causal: bool) -> Tensor:
        heads = qkv.unflatten(-1, (3, self.num_heads, -1))  # [B, N, 3, H, E]
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # each [B, H, N, E]
        dropout_p = self.attn_drop if self.training else 0.0
        mixed = attend(q, k, v, is_causal=is_causal, dropout_p=dropout_p, backend=self.backend)
        return mixed.transpose(1, 2).flatten(2)  # [B, N, D]


class MemEffAttention(Attention):
    """The attention of the released models; differs from :class:`Attention` in its call only."""

    def forward(
        self,
        x: Tensor,
        attn_bias: PackedLayout | None = None,
        *,
        rows: Tensor | None = None,
        scale: nn.Module | None = None,
    ) -> Tensor:
        """See :meth:`Attention.forward`."""
        return super().forward(x, attn_bias=attn_bias, rows=rows, scale=scale)
