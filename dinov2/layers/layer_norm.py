"""Layer normalisation (Ba et al. 2016) that also takes weights of fewer bits than its input has."""

import torch.nn.functional as F
from torch import Tensor, nn


class LayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` whose weights may be narrower than the tokens.

    Sharded blocks are gathered in a 16-bit format while the residual stream stays float32. Autocast widens
    the weights on a GPU; a CPU kernel refuses the mixture.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``[..., D]``; the result has the format that ``nn.LayerNorm`` gives."""
        if self.weight.element_size() >= x.element_size():
            return super().forward(x)
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)
