"""Teacher targets that are kept as scores with a few vectors of scales, and made only where they are read.

Shapes: n rows (samples or masked patches) of one micro-batch, K prototypes.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from dinov2 import distributed
from dinov2.loss.tiles import tiles

TINY = torch.finfo(torch.float32).tiny


class Targets:
    """The [n, K] prototype assignments of n rows; each row sums to 1.

    Args:
        count: n.
        width: K.
        device: where they are.
        make: returns the float32 targets [r, K] of the rows in a slice, as a tensor that the caller owns.
    """

    def __init__(self, count: int, width: int, device: torch.device, make: Callable[[slice], Tensor]) -> None:
        self.count = count
        self.width = width
        self.device = device
        self._make = make

    @torch.no_grad()
    def rows(self, which: slice) -> Tensor:
        """Return the float32 targets [r, K] of a slice of rows, a new tensor."""
        return self._make(which)

    def dense(self) -> Tensor:
        """Return all targets, [n, K] float32."""
        out = torch.empty(self.count, self.width, device=self.device)
        for which in tiles(self.count, self.width, self.device):
            out[which] = self.rows(which)
        return out


@torch.no_grad()
def sinkhorn_knopp(logits: Tensor, temperature: float, n_iterations: int = 3) -> Tensor:
    """Assign rows to prototypes so that every prototype receives the same share of all rows.

    The matrix exp(logits / temperature) is scaled alternately to equal prototype sums and to unit row sums
    (Sinkhorn-Knopp; SwAV, arXiv:2006.09882, section 3.1; DINOv2, arXiv:2304.07193, section 4). It is kept
    as ``E * prototype_scale * row_scale``, so an iteration is two matrix-vector products. E has each row's
    own maximum taken out, and the weight this removes is the first ``row_scale``: the result is that of the
    plain definition, but no entry overflows and no row vanishes. The numbers of rows and of prototypes by
    which the definition divides cancel out of the result.

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
    chunks: Sequence[Tensor], temperature: float, n_iterations: int = 3, *, overwrite: bool = False
) -> list[Targets]:
    """:func:`sinkhorn_knopp` of the rows of all chunks together, as targets that are made on demand.

    What is kept is the logits. E is computed anew, tile by tile, in each of the ``n_iterations`` passes over
    them and where targets are read; or once, if it may take the place of float32 logits.

    Args:
        chunks: logits [n, K] each; the same number of chunks on every rank, at least one.
        temperature: teacher temperature, > 0.
        n_iterations: rounds of scaling, >= 1.
        overwrite: float32 logits are no longer needed and may be written to.

    Returns:
        The targets of each chunk; reading them uses no collective.
    """
    parts = [_Rows(logits, temperature, overwrite) for logits in chunks]
    global_max = torch.stack([part.largest() for part in parts]).max()
    distributed.all_reduce_max_(global_max)
    prototype_scale = None
    for _ in range(n_iterations):
        prototype_sums = added(part.prototype_sums(global_max, prototype_scale) for part in parts)
        distributed.all_reduce_sum_(prototype_sums)
        # A prototype whose every entry underflowed stays at zero instead of turning into 0 * inf. Dividing
        # by K keeps the scale of a prototype that few rows want within range.
        prototype_scale = 1.0 / (prototype_sums.clamp_min(TINY) * len(prototype_sums))
    return [part.targets(prototype_scale) for part in parts]


class _Rows:
    """One chunk of the matrix that Sinkhorn-Knopp scales.

    Args:
        logits: [n, K].
        temperature: teacher temperature, > 0.
        overwrite: whether E may take the place of float32 logits.
    """

    def __init__(self, logits: Tensor, temperature: float, overwrite: bool) -> None:
        self.temperature = temperature
        self._scores = logits
        self._holds_kernel = overwrite and logits.dtype == torch.float32
        self.row_max = torch.empty(len(logits), device=logits.device)
        for which in self._tiles():
            self.row_max[which] = logits[which].amax(dim=1)
            if self._holds_kernel:
                self._exponentiate(logits[which].sub_(self.row_max[which, None]))

    def largest(self) -> Tensor:
        return self.row_max.max() if len(self.row_max) else self.row_max.new_full((), float("-inf"))

    def prototype_sums(self, global_max: Tensor, prototype_scale: Tensor | None) -> Tensor:
        """Return the [K] column sums once rows have been scaled: to their weight at first, then to sum 1."""
        sums = torch.zeros(self._scores.shape[1], device=self._scores.device)
        for which in self._tiles():
            kernel = self._kernel(which)
            if prototype_scale is None:
                row_scale = ((self.row_max[which] - global_max) / self.temperature).exp()
            else:
                row_scale = 1.0 / (kernel @ prototype_scale).clamp_min(TINY)
            sums.addmv_(kernel.T, row_scale)
        return sums

    def targets(self, prototype_scale: Tensor) -> Targets:
        make = partial(self._targets, prototype_scale=prototype_scale)
        return Targets(*self._scores.shape, self._scores.device, make)

    def _targets(self, which: slice, prototype_scale: Tensor) -> Tensor:
        scaled = self._kernel(which) * prototype_scale
        return scaled.mul_(1.0 / scaled.sum(dim=1, keepdim=True).clamp_min(TINY))

    def _kernel(self, which: slice) -> Tensor:
        """Return E of the rows in a slice; to be read only."""
        if self._holds_kernel:
            return self._scores[which]
        return self._exponentiate(self._scores[which] - self.row_max[which, None])

    def _exponentiate(self, shifted: Tensor) -> Tensor:
        return shifted.mul_(1.0 / self.temperature).exp_()

    def _tiles(self) -> Iterable[slice]:
        return tiles(*self._scores.shape, self._scores.device)


def added(tensors: Iterable[Tensor]) -> Tensor:
    """Add up in place, one tensor at a time."""
    iterator = iter(tensors)
    total = next(iterator)
    for tensor in iterator:
        total += tensor
    return total
