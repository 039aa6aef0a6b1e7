"""Teacher targets that are kept as scores and one bias per prototype, and made only where they are read.

Shapes: n rows (samples or masked patches) of one micro-batch, K prototypes.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from dinov2 import distributed
from dinov2.compiled import compiled
from dinov2.loss.tiles import tiles

TINY = torch.finfo(torch.float32).tiny


class Targets:
    """The prototype assignments softmax(scores / temperature + bias) of n rows.

    Both ways to make targets come to this: Sinkhorn-Knopp scales columns, which is a bias, and rows to sum 1,
    which is the softmax; centring subtracts a centre.

    Args:
        scores: [n, K] of the teacher, in any number format.
        temperature: teacher temperature, > 0.
        bias: [K] float32.
    """

    def __init__(self, scores: Tensor, temperature: float, bias: Tensor) -> None:
        self.scores = scores
        self.temperature = temperature
        self.bias = bias

    def __len__(self) -> int:
        return len(self.scores)

    @torch.no_grad()
    def rows(self, which: slice) -> Tensor:
        """Return the float32 targets [r, K] of a slice of rows, a new tensor; each row sums to 1."""
        shares = torch.softmax(self.shifted(which), dim=1)
        if shares.device.type == "cpu":
            # Its softmax adds up a row in few running sums: rows of nearly equal scores come to 1 + 4e-5.
            shares.div_(shares.sum(dim=1, keepdim=True))
        return shares

    def part(self, which: slice) -> "Targets":
        """Return those of a slice of rows."""
        return Targets(self.scores[which], self.temperature, self.bias)

    def dense(self) -> Tensor:
        """Return all targets, [n, K] float32."""
        out = torch.empty(self.scores.shape, device=self.scores.device)
        for which in tiles(*self.scores.shape, self.scores.device):
            out[which] = self.rows(which)
        return out

    def shifted(self, which: slice) -> Tensor:
        """Return scores / temperature + bias [r, K] of a slice of rows, float32."""
        return torch.add(self.bias, self.scores[which], alpha=1.0 / self.temperature)


@torch.no_grad()
def sinkhorn_knopp(logits: Tensor, temperature: float, n_iterations: int = 3) -> Tensor:
    """Assign rows to prototypes so that every prototype receives the same share of all rows.

    The matrix exp(logits / temperature) is scaled alternately to equal prototype sums and to unit row sums
    (Sinkhorn-Knopp; SwAV, arXiv:2006.09882, section 3.1; DINOv2, arXiv:2304.07193, section 4). Neither it nor
    the result is stored: a softmax does the rows, the logarithm of the prototypes' scales is its bias, and
    an iteration is one pass over the logits. No entry overflows, no row vanishes. The numbers of rows and of
    prototypes by which the definition divides cancel out of the result.

    Args:
        logits: [n, K] teacher scores of this rank; n may be 0 when other ranks have rows.
        temperature: teacher temperature, > 0.
        n_iterations: rounds of scaling, >= 1.

    Returns:
        [n, K] float32 targets; each row sums to 1.
    """
    (targets,) = joint_sinkhorn_knopp([logits], temperature, n_iterations)
    return targets.dense()


@torch.no_grad()
def joint_sinkhorn_knopp(
    chunks: Sequence[Tensor], temperature: float, n_iterations: int = 3, *, compile: bool = False
) -> list[Targets]:
    """:func:`sinkhorn_knopp` of the rows of all chunks together, as targets that are made on demand.

    Args:
        chunks: logits [n, K] each; the same number of chunks on every rank, at least one.
        temperature: teacher temperature, > 0.
        n_iterations: rounds of scaling, >= 1.
        compile: run through torch.compile.

    Returns:
        The targets of each chunk; reading them uses no collective. They share one bias.
    """
    width = chunks[0].shape[1]
    bias = torch.zeros(width, device=chunks[0].device)
    parts = [Targets(logits, temperature, bias) for logits in chunks]
    for iteration in range(n_iterations):
        sums = _balanced_sums(parts, compile) if iteration else _first_sums(parts, compile)
        distributed.all_reduce_sum_(sums)
        # A prototype whose every entry underflowed gets a large, finite scale.
        bias.sub_(sums.clamp_min_(TINY).log_()).sub_(math.log(width))
    return parts


def _first_sums(parts: Sequence[Targets], compile: bool) -> Tensor:
    """Return the [K] sums of exp(logits / temperature) over all rows, in units of the largest row.

    The sum of a row is written as the softmax times the row's own sum; the unit grows as larger rows come.
    """
    bias = parts[0].bias
    sums = torch.zeros_like(bias)
    unit = bias.new_full((), float("-inf"))
    for part in parts:
        if compile and len(part):
            factor = torch.full_like(unit, 1.0 / part.temperature)
            larger = torch.maximum(unit, part.scores.amax() * factor)
            sums.mul_((unit - larger).exp())
            sums += compiled(_column_sums)(part.scores, factor, larger)
            unit = larger
            continue
        for which in tiles(*part.scores.shape, bias.device):
            shifted = part.shifted(which)
            shares = torch.softmax(shifted, dim=1)
            largest, at = shares.max(dim=1, keepdim=True)
            log_sums = (shifted.gather(1, at) - largest.log()).squeeze(1)
            larger = torch.maximum(unit, log_sums.max())
            sums.mul_((unit - larger).exp())
            sums.addmv_(shares.T, (log_sums - larger).exp())
            unit = larger
    everywhere = unit.clone()
    distributed.all_reduce_max_(everywhere)
    return sums.mul_((unit - everywhere).exp())


def _balanced_sums(parts: Sequence[Targets], compile: bool) -> Tensor:
    """Return the [K] sums of the rows as they are scaled now."""
    sums = torch.zeros_like(parts[0].bias)
    for part in parts:
        if compile and len(part):
            factor = torch.full((), 1.0 / part.temperature, device=sums.device)
            sums += compiled(_softmax_sums)(part.scores, factor, part.bias)
            continue
        for which in tiles(*part.scores.shape, sums.device):
            sums += part.rows(which).sum(dim=0)
    return sums


def _column_sums(scores: Tensor, factor: Tensor, unit: Tensor) -> Tensor:
    return (scores.float() * factor - unit).exp().sum(dim=0)


def _softmax_sums(scores: Tensor, factor: Tensor, bias: Tensor) -> Tensor:
    return torch.softmax(scores.float() * factor + bias, dim=1).sum(dim=0)


def added(tensors: Iterable[Tensor]) -> Tensor:
    """Add up in place, one tensor at a time."""
    iterator = iter(tensors)
    total = next(iterator)
    for tensor in iterator:
        total += tensor
    return total
