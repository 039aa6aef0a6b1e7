"""Stochastic depth per sample (Huang et al. 2016)."""

from torch import Tensor, nn


def drop_path(x: Tensor, drop_prob: float = 0.0, training: bool = False) -> Tensor:
    """Zero whole samples of ``x`` with probability ``drop_prob`` and scale the others to keep the mean.

    Args:
        x: ``[B, ...]``.
        drop_prob: 0..1.
        training: without it, or at probability 0, ``x`` is returned as it is.
    """
    if not training or drop_prob == 0.0:
        return x
    keep_prob = 1.0 - drop_prob
    keep = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(keep_prob)
    # At probability 1 every sample is dropped and there is nothing to scale.
    return x * (keep.div_(keep_prob) if keep_prob > 0.0 else keep)


class DropPath(nn.Module):
    """:func:`drop_path` as a module, active in training mode."""

    def __init__(self, drop_prob: float | None = None) -> None:
        super().__init__()
        self.drop_prob = drop_prob or 0.0

    def forward(self, x: Tensor) -> Tensor:
        return drop_path(x, self.drop_prob, self.training)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob}"
