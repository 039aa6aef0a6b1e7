"""Targets from a running centre of the teacher's logits, and the cross-entropy, shared by DINO and iBOT.

Shapes: n rows (samples or masked patches) of this rank, K prototypes. With a process group, statistics are
taken over the rows of all ranks. A rank may hold its rows in several chunks, the micro-batches of one step:
the statistics are those of all of them.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dinov2 import distributed
from dinov2.loss.targets import Targets, added


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
    def center_jointly(self, chunks: Sequence[Tensor], teacher_temp: float) -> list[Targets]:
        """Make the targets of several chunks with one centre, and move it once, by the rows of all of them.

        Args:
            chunks: logits [n, K] each, the micro-batches of a step, which count as ranks do.
            teacher_temp: teacher temperature, > 0.

        Returns:
            The targets of each chunk; to be read before the next step moves the centre.
        """
        self.apply_center_update()
        self.reduce_center_update(*chunks)
        return [
            Targets(*logits.shape, logits.device, partial(self._softmax_rows, logits, teacher_temp))
            for logits in chunks
        ]

    def _softmax_rows(self, teacher_logits: Tensor, teacher_temp: float, which: slice) -> Tensor:
        return self._softmax(teacher_logits[which], teacher_temp)

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
        self.async_batch_center = added(map(self._statistics, teacher_logits))
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
        rows = self._center_rows(teacher_logits)
        count = torch.full((1,), float(len(rows)), device=rows.device)
        return torch.cat([rows.sum(dim=0, dtype=torch.float32), count])

    def _center_rows(self, teacher_logits: Tensor) -> Tensor:
        """Return the [rows, K] statistics of this rank whose mean moves the centre; any number format."""
        raise NotImplementedError


def soft_cross_entropy(student_logits: Tensor, teacher_probs: Tensor, student_temp: float) -> Tensor:
    """Return [...] = -sum_k teacher * log softmax(student / temperature), in float32, for [..., K] inputs."""
    log_probs = torch.log_softmax(student_logits.float() / student_temp, dim=-1)
    return -(teacher_probs * log_probs).sum(dim=-1)
