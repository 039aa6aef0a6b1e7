"""Projection head from tokens to prototype scores (Caron et al. 2021, DINO, section 3.1 and appendix C)."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2.layers.prototype_scores import prototype_scores


class WeightNormLinear(nn.Module):
    """Bias-free linear layer whose rows are ``weight_g * weight_v / |weight_v|`` (Salimans & Kingma 2016).

    A plain module instead of ``torch.nn.utils.weight_norm``: published heads store exactly these two keys,
    and without hooks it can be copied, sharded and compiled.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight_g = nn.Parameter(torch.ones(out_features, 1))
        self.weight_v = nn.Parameter(torch.empty(out_features, in_features))
        nn.init.kaiming_uniform_(self.weight_v, a=math.sqrt(5))  # what nn.Linear does

    @property
    def weight(self) -> Tensor:
        """The effective matrix ``[out_features, in_features]``, in float32 at least."""
        direction, gain = self.weight_v, self.weight_g
        if direction.dtype in (torch.float16, torch.bfloat16):  # squares of small weights vanish in float16
            direction, gain = direction.float(), gain.float()
        # One pass in each direction; written out, the backward pass goes over the matrix ten times.
        return torch._weight_norm(direction, gain, 0)

    def forward(self, x: Tensor, then: Callable[[Tensor, Tensor], Any] | None = None) -> Any:
        """Return ``x [..., in] @ weight.T``, or ``then(x, weight)``, which makes the product itself."""
        return prototype_scores(x, self.weight.to(x.dtype)) if then is None else then(x, self.weight)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class DINOHead(nn.Module):
    """MLP to a bottleneck, L2 normalisation, weight-normalised prototypes; no temperature, no softmax.

    Args:
        in_dim: token width D.
        out_dim: prototypes K.
        use_bn: batch normalisation after the hidden layers.
        nlayers: linear layers of the MLP; values below 1 count as 1.
        hidden_dim: width of the hidden layers.
        bottleneck_dim: width before the prototypes.
        mlp_bias: bias of the MLP's layers.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        use_bn: bool = False,
        nlayers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        mlp_bias: bool = True,
    ) -> None:
        super().__init__()
        widths = [in_dim] + [hidden_dim] * (max(nlayers, 1) - 1) + [bottleneck_dim]
        self.mlp = _projection(widths, use_bn, mlp_bias)
        self.last_layer = WeightNormLinear(bottleneck_dim, out_dim)

    def forward(self, x: Tensor, then: Callable[[Tensor, Tensor], Any] | None = None) -> Any:
        """Score tokens ``[..., D]`` against the prototypes.

        Args:
            x: tokens.
            then: called, instead of scoring, with the normalised features ``[..., bottleneck_dim]`` and the
                matrix of prototypes ``[K, bottleneck_dim]``. A loss that needs no score twice can so do
                without a tensor of all of them.

        Returns:
            ``[..., K]``, or what ``then`` returns.
        """
        x = self.mlp(x)
        eps = 1e-6 if x.dtype == torch.float16 else 1e-12  # 1e-12 is zero in float16
        x = F.normalize(x, dim=-1, eps=eps)
        return self.last_layer(x) if then is None else self.last_layer(x, then)


def _projection(widths: list[int], use_bn: bool, bias: bool) -> nn.Module:
    """Return the MLP through ``widths``; a lone linear layer is not wrapped, as published keys require."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in zip(widths, widths[1:], strict=False):
        linear = nn.Linear(fan_in, fan_out, bias=bias)
        nn.init.trunc_normal_(linear.weight, std=0.02)
        if bias:
            nn.init.zeros_(linear.bias)
        layers += [linear, *([nn.BatchNorm1d(fan_out)] if use_bn else []), nn.GELU()]
    del layers[-2 if use_bn else -1 :]  # nothing follows the bottleneck
    return layers[0] if len(layers) == 1 else nn.Sequential(*layers)
