"""Learned gain per channel on a residual branch (Touvron et al. 2021, CaiT, section 2)."""

import torch
from torch import Tensor, nn


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
