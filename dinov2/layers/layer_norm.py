"""Layer normalisation (Ba et al. 2016) that also takes weights of fewer bits than its input has."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dinov2.compiled import kept, left_to_autograd
from dinov2.layers.autocast import autocast_dtype

# Where compiled code takes gradients of what is kept rounded. A CPU computes no faster than it reads: there a
# step of ViT-S/14 was 4 % slower for it.
DEVICES = ("cuda",)


class LayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` whose weights may be narrower than the tokens.

    Sharded blocks are gathered in a 16-bit format while the residual stream stays float32. Autocast widens
    the weights on a GPU; a CPU kernel refuses the mixture.
    """

    # Whether it is a part of what dinov2.compiled compiles; may be set per module.
    compiled = False

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``[..., D]``; the result has the format that ``nn.LayerNorm`` gives."""
        dtype = self._kept_dtype(x)
        if dtype is not None:
            return normalised(x, self.weight, self.bias, self.eps, dtype)
        if self.weight is None or self.weight.element_size() >= x.element_size():
            return super().forward(x)
        weight, bias = self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)

    def _kept_dtype(self, x: Tensor) -> torch.dtype | None:
        """Return in which 16 bits compiled code keeps what gradients are made of; None if it does not."""
        learns = torch.is_grad_enabled() and x.requires_grad and x.dtype == torch.float32
        usual = len(self.normalized_shape) == 1 and self.weight is not None and self.bias is not None
        pays = self.compiled and x.device.type in DEVICES and torch.compiler.is_compiling()
        dtype = autocast_dtype(x.device) if learns and usual and pays else None
        return dtype if dtype in (torch.bfloat16, torch.float16) else None


class _Normalised(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        variance, mean = torch.var_mean(x, dim=-1, correction=0, keepdim=True)
        scale = torch.rsqrt(variance + eps)
        standard = (x - mean) * scale
        return standard * weight.float() + bias.float(), kept(standard.to(dtype)), scale

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, weight, _, _, _ = inputs
        _, standard, scale = output
        ctx.mark_non_differentiable(standard, scale)
        ctx.save_for_backward(standard, scale, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        standard, scale, weight = ctx.saved_tensors
        standard, inner = standard.float(), grad * weight.float()
        along = (inner * standard).mean(dim=-1, keepdim=True)
        grad_x = (inner - inner.mean(dim=-1, keepdim=True) - standard * along) * scale
        rows = tuple(range(grad.dim() - 1))
        grad_weight, grad_bias = (grad * standard).sum(rows), grad.sum(rows)
        return grad_x, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype), None, None


@left_to_autograd
def normalised(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Layer normalisation whose gradients are made of its own result, rounded, and not of its input.

    In a block the input is the residual stream in float32: twice as much to keep, or to make again, and to
    read in the backward pass.

    Args:
        x: ``[..., D]`` float32.
        weight: gains ``[D]``.
        bias: ``[D]``.
        eps: what is added to the variance.
        dtype: format in which the result before gains and bias is kept.

    Returns:
        ``[..., D]`` float32, not rounded.
    """
    return _Normalised.apply(x, weight, bias, eps, dtype)[0]
