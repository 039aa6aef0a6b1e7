"""Learned gain per channel on a residual branch (Touvron et al. 2021, CaiT, section 2)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2.layers.autocast import autocast_dtype


class LayerScale(nn.Module):
    """Multiply each channel by a learned gain ``gamma``.

    Args:
        dim: channels D.
        init_values: initial gain, a number or a tensor that broadcasts to ``[D]``.
        inplace: overwrite the input instead of allocating.
        device: where ``gamma`` lives.
        dtype: dtype of ``gamma``.
    """

    def __init__(
        self,
        dim: int,
        init_values: float | Tensor = 1e-5,
        inplace: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.inplace = inplace
        self.init_values = init_values
        self.gamma = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set every gain to its initial value."""
        if isinstance(self.init_values, Tensor):
            self.gamma.copy_(self.init_values.expand_as(self.gamma))
        else:
            self.gamma.fill_(self.init_values)

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(self.gamma) if self.inplace else x * self.gamma


def scaled_linear(layer: nn.Module, scale: nn.Module | None, x: Tensor) -> Tensor:
    """Return ``scale(layer(x))``.

    Where gains learn, they are multiplied into the weights: ``x (gamma W)^T + gamma b``. Their gradient then
    comes from that of the weights, and the layer's result, which has as many rows as ``x``, neither has to be
    kept for it nor is read again. Not so with hooks on either module, which would not be called, for
    ``torch.jit.trace``, and in float16, which has no room for young gains times weights or gradients.

    Args:
        layer: ends a residual branch, ``[..., C]`` to ``[..., D]``.
        scale: the branch's :class:`LayerScale`; None for none.
        x: ``[..., C]``.
    """
    if scale is None:
        return layer(x)
    if not _folds(layer, scale, x):
        return scale(layer(x))
    gains = scale.gamma
    bias = None if layer.bias is None else layer.bias * gains
    return F.linear(x, layer.weight * gains[:, None], bias)


def _folds(layer: nn.Module, scale: nn.Module, x: Tensor) -> bool:
    if type(layer) is not nn.Linear or type(scale) is not LayerScale or _is_watched(layer, scale):
        return False
    if not torch.is_grad_enabled() or not scale.gamma.requires_grad or torch.jit.is_tracing():
        return False
    return (autocast_dtype(x.device) or layer.weight.dtype) != torch.float16


def _is_watched(*modules: nn.Module) -> bool:
    return any(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        for module in modules
    )
