"""Gated feed-forward networks (Shazeer 2020, "GLU Variants Improve Transformer"; SwiGLU with a SiLU gate)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2.layers.backend import XFORMERS_AVAILABLE, XFORMERS_ENABLED
from dinov2.layers.layer_scale import scaled_linear

__all__ = ["XFORMERS_AVAILABLE", "XFORMERS_ENABLED", "SwiGLUFFN", "SwiGLUFFNAligned", "SwiGLUFFNFused"]


def _two_thirds(hidden: int, multiple_of: int) -> int:
    """Two thirds of ``hidden`` rounded up, so that three matrices weigh as much as the two of an MLP."""
    reduced = int(hidden * 2 / 3)
    return reduced + -reduced % multiple_of


class SwiGLUFFN(nn.Module):
    """``w3(silu(a) * b)`` with ``a, b`` the halves of ``w12(x)``.

    Args:
        in_features: token width.
        hidden_features: width of each half, ``in_features`` if not given.
        out_features: output width, ``in_features`` if not given.
        act_layer: accepted because blocks pass it to every feed-forward; the gate is always SiLU.
        drop: dropout probability of the gated features and of the output, as in :class:`Mlp`.
        bias: bias on all layers.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[..., nn.Module] | None = None,
        drop: float = 0.0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        hidden = hidden_features or in_features
        self.w12 = nn.Linear(in_features, 2 * hidden, bias=bias)
        self.w3 = nn.Linear(hidden, out_features or in_features, bias=bias)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor, scale: nn.Module | None = None) -> Tensor:
        """Transform ``x``; ``scale`` is the LayerScale of the result."""
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.drop(scaled_linear(self.w3, scale, self.drop(F.silu(gate) * value)))


class SwiGLUFFNFused(SwiGLUFFN):
    """:class:`SwiGLUFFN` with two thirds of the hidden width, rounded up to a multiple of 8."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[..., nn.Module] | None = None,
        drop: float = 0.0,
        bias: bool = True,
    ) -> None:
        hidden = _two_thirds(hidden_features or in_features, multiple_of=8)
        super().__init__(in_features, hidden, out_features, act_layer, drop, bias)


class SwiGLUFFNAligned(nn.Module):
    """The same function with separate matrices ``w1`` (gate), ``w2`` (value) and ``w3``.

    Args:
        align_to: the hidden width, two thirds of the given one, is rounded up to a multiple of this.
        device: where the parameters live.
        in_features, hidden_features, out_features, act_layer, drop, bias: see :class:`SwiGLUFFN`.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[..., nn.Module] | None = None,
        drop: float = 0.0,
        bias: bool = True,
        align_to: int = 8,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        hidden = _two_thirds(hidden_features or in_features, multiple_of=align_to)
        self.w1 = nn.Linear(in_features, hidden, bias=bias, device=device)
        self.w2 = nn.Linear(in_features, hidden, bias=bias, device=device)
        self.w3 = nn.Linear(hidden, out_features or in_features, bias=bias, device=device)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor, scale: nn.Module | None = None) -> Tensor:
        """Transform ``x``; ``scale`` is the LayerScale of the result."""
        hidden = self.drop(F.silu(self.w1(x)) * self.w2(x))
        return self.drop(scaled_linear(self.w3, scale, hidden))
