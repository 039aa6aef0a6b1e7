"""Turning teacher logits into targets: Sinkhorn-Knopp and the running centre, shared by DINO and iBOT.

Shapes: n rows (samples or masked patches) of this rank, K prototypes. Both ways work with and without a
process group; with one, statistics are taken over the rows of all ranks. A rank may hold its rows in several
chunks, the micro-batches of one step: the statistics are those of all of them, and the targets of each are
made when they are asked for, so that only one chunk's targets need memory at a time.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dinov2 import distributed

TINY = torch.finfo(torch.float32).tiny


@torch.no_grad()
def sinkhorn_knopp(logits: Tensor, temperature: float, n_iterations: int = 3) -> Tensor:
    """Assign rows to prototypes so that every prototype receives the same share of all rows.

    The matrix exp(logits / temperature) is scaled alternately to equal prototype sums and to unit row sums
    (Sinkhorn-Knopp; SwAV, arXiv:2006.09882, section 3.1; DINOv2, arXiv:2304.07193, section 4). It is kept
    as ``E * prototype_scale * row_scale`` with E computed once, so an iteration is two matrix-vector
    products. E has each row's own maximum taken out, and the weight this removes is the first
    ``row_scale``: the result is that of the plain definition, but no entry overflows and no row vanishes.
    The numbers of rows and of prototypes by which the definition divides cancel out of the result.

    Args:
        logits: [n, K] teacher scores of this rank; n may be 0 when other ranks have rows.
        temperature: teacher temperature, > 0.
        n_iterations: rounds of scaling, >= 1.

    Returns:
        [n, K] float32 targets; each row sums to 1.
    """
    (targets,) = joint_sinkhorn_knopp([logits], temperature, n_iterations)
    return targets()


@torch.no_grad()
def joint_sinkhorn_knopp(
    chunks: Sequence[Tensor], temperature: float, n_iterations: int = 3
) -> list[Callable[[], Tensor]]:
    """:func:`sinkhorn_knopp` of the rows of all chunks together.

    One chunk is computed as ever. Of several only the logits are kept: E of a chunk is computed
    ``n_iterations + 1`` times, each time anew and for that chunk alone.

    Args:
        chunks: logits [n, K] each; the same number of chunks on every rank, at least one.
        temperature: teacher temperature, > 0.
        n_iterations: rounds of scaling, >= 1.

    Returns:
        For each chunk a function, to be called once, that returns its [n, K] float32 targets and uses no
        collective.
    """
    parts = [_Rows(logits, temperature, keep_kernel=len(chunks) == 1) for logits in chunks]
    global_max = torch.stack([part.largest() for part in parts]).max()
    distributed.all_reduce_max_(global_max)
    prototype_scale = None
    for _ in range(n_iterations):
        prototype_sums = _added(part.prototype_sums(global_max, prototype_scale) for part in parts)
        distributed.all_reduce_sum_(prototype_sums)
        # A prototype whose every entry underflowed stays at zero instead of turning into 0 * inf. Dividing
        # by K keeps the scale of a prototype that few rows want within range.
        prototype_scale = 1.0 / (prototype_sums.clamp_min(TINY) * len(prototype_sums))
    return [partial(part.targets, prototype_scale) for part in parts]


class _Rows:
    """One chunk of the matrix that Sinkhorn-Knopp scales.

    Args:
        logits: [n, K].
        temperature: teacher temperature, > 0.
        keep_kernel: compute E once and keep it, rather than the logits.
    """

    def __init__(self, logits: Tensor, temperature: float, *, keep_kernel: bool) -> None:
        self.temperature = temperature
        scaled = logits.float() / temperature
        self.row_max = scaled.amax(dim=1) if len(scaled) else scaled.new_empty(0)
        self._kept = (scaled - self.row_max[:, None]).exp() if keep_kernel else None
        self._logits = None if keep_kernel else logits

    def largest(self) -> Tensor:
        return self.row_max.max() if len(self.row_max) else self.row_max.new_full((), float("-inf"))

    def prototype_sums(self, global_max: Tensor, prototype_scale: Tensor | None) -> Tensor:
        """Return the [K] column sums once rows have been scaled: to their weight at first, then to sum 1."""
        kernel = self._kernel()
        if prototype_scale is None:
            return kernel.T @ (self.row_max - global_max).exp()
        return kernel.T @ _row_scale(kernel, prototype_scale)

    @torch.no_grad()
    def targets(self, prototype_scale: Tensor) -> Tensor:
        kernel = self._kernel()
        row_scale = _row_scale(kernel, prototype_scale)
        return kernel.mul_(prototype_scale).mul_(row_scale[:, None])

    def _kernel(self) -> Tensor:
        if self._kept is not None:
            return self._kept
        return (self._logits.float() / self.temperature - self.row_max[:, None]).exp()


def _row_scale(kernel: Tensor, prototype_scale: Tensor) -> Tensor:
    return 1.0 / (kernel @ prototype_scale).clamp_min(TINY)


def _added(tensors: Iterable[Tensor]) -> Tensor:
    """Add up in place, one tensor at a time."""
    iterator = iter(tensors)
    total = next(iterator)
    for tensor in iterator:
        total += tensor
    return total


class CenteredLoss(nn.Module):
    """A loss whose teacher targets are softmax((logits - centre) / temperature).

    The centre is an exponential moving average of the teacher's mean logits over all ranks (DINO,
    arXiv:2104.14294, equation 4). The mean of a step is reduced while the step goes on and takes effect
    when the next targets are computed: step t uses the statistics of the steps before it.

    Args:
        center_shape: shape of the ``center`` buffer; its last axis has K entries.
        student_temp: student temperature, > 0.
        center_momentum: share of the old centre kept by an update, 0..1.
    """

    def __init__(self, center_shape: tuple[int, ...], student_temp: float, center_momentum: float) -> None:
        super().__init__()
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.register_buffer("center", torch.zeros(center_shape))
        self.updated = True
        self.reduce_handle: dist.Work | None = None
        self.async_batch_center: Tensor | None = None  # [K + 1]: sum of the statistics, and their number

    @torch.no_grad()
    def softmax_center_teacher(self, teacher_logits: Tensor, teacher_temp: float) -> Tensor:
        """Return float32 targets of the shape of ``teacher_logits`` ([..., K]); rows sum to 1."""
        self.apply_center_update()
        return self._softmax(teacher_logits, teacher_temp)

    @torch.no_grad()
    def center_jointly(self, chunks: Sequence[Tensor], teacher_temp: float) -> list[Callable[[], Tensor]]:
        """Make the targets of several chunks with one centre, and move it once, by the rows of all of them.

        Args:
            chunks: logits [..., K] each, the micro-batches of a step, which count as ranks do.
            teacher_temp: teacher temperature, > 0.

        Returns:
            For each chunk a function that returns its float32 targets; to be called before the next step.
        """
        self.apply_center_update()
        self.reduce_center_update(*chunks)
        return [partial(self._softmax, logits, teacher_temp) for logits in chunks]

    @torch.no_grad()
    def _softmax(self, teacher_logits: Tensor, teacher_temp: float) -> Tensor:
        return torch.softmax((teacher_logits.float() - self.center.flatten()) / teacher_temp, dim=-1)

    @torch.no_grad()
    def update_center(self, teacher_logits: Tensor) -> None:
        """Start an update of the centre from this step's teacher logits ([..., K])."""
        self.reduce_center_update(teacher_logits)

    @torch.no_grad()
    def reduce_center_update(self, *teacher_logits: Tensor) -> None:
        """Take this rank's statistics in float32, of one or more chunks, and start summing over the ranks."""
        self.async_batch_center = _added(map(self._statistics, teacher_logits))
        if distributed.is_enabled():
            self.reduce_handle = dist.all_reduce(self.async_batch_center, async_op=True)
        self.updated = False

    @torch.no_grad()
    def apply_center_update(self) -> None:
        """Finish a pending update.

        The centre stays as it is without one, if no rank had any row, and if the statistics are not finite:
        one inf or NaN would stay in the running average for ever.
        """
        if self.updated:
            return
        if self.reduce_handle is not None:
            self.reduce_handle.wait()
            self.reduce_handle = None
        total, count = self.async_batch_center[:-1], self.async_batch_center[-1]
        mean = (total / count.clamp_min(1.0)).view_as(self.center)
        blended = self.center * self.center_momentum + mean * (1.0 - self.center_momentum)
        usable = (count > 0) & total.isfinite().all()
        self.center.copy_(torch.where(usable, blended, self.center))
        self.async_batch_center = None
        self.updated = True

    def discard_center_update(self) -> None:
        """Forget a pending update, of a step that does not count."""
        if self.reduce_handle is not None:
            self.reduce_handle.wait()
            self.reduce_handle = None
        self.async_batch_center = None
        self.updated = True

    def _statistics(self, teacher_logits: Tensor) -> Tensor:
        """Return [K + 1]: the sum of the rows that move the centre, and their number."""
        rows = self._center_rows(teacher_logits.float())
        return torch.cat([rows.sum(dim=0), rows.new_tensor([float(len(rows))])])

    def _center_rows(self, teacher_logits: Tensor) -> Tensor:
        """Return the [rows, K] statistics of this rank whose mean moves the centre."""
        raise NotImplementedError


def soft_cross_entropy(student_logits: Tensor, teacher_probs: Tensor, student_temp: float) -> Tensor:
    """Return [...] = -sum_k teacher * log softmax(student / temperature), in float32, for [..., K] inputs."""
    log_probs = torch.log_softmax(student_logits.float() / student_temp, dim=-1)
    return -(teacher_probs * log_probs).sum(dim=-1)
