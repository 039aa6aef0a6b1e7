"""Cross-entropy between cls-token predictions of different views (DINO, arXiv:2104.14294, equation 3)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dinov2.loss.centering import CenteredLoss, soft_cross_entropy
from dinov2.loss.targets import sinkhorn_knopp


class DINOLoss(CenteredLoss):
    """Image-level term: the student's views predict the teacher's prototype assignment.

    Args:
        out_dim: number of prototypes K.
        student_temp: student temperature, > 0.
        center_momentum: share of the old centre kept by an update, 0..1.

    The ``center`` buffer has shape [1, K].
    """

    def __init__(self, out_dim: int, student_temp: float = 0.1, center_momentum: float = 0.9) -> None:
        super().__init__((1, out_dim), student_temp, center_momentum)

    @torch.no_grad()
    def sinkhorn_knopp_teacher(
        self, teacher_output: Tensor, teacher_temp: float, n_iterations: int = 3
    ) -> Tensor:
        """Return float32 targets [n, K] from logits [n, K], balanced over the rows of all ranks."""
        return sinkhorn_knopp(teacher_output, teacher_temp, n_iterations=n_iterations)

    def forward(
        self,
        student_output_list: Sequence[Tensor],
        teacher_out_softmaxed_centered_list: Sequence[Tensor],
    ) -> Tensor:
        """Sum the mean cross-entropies of every (student view, teacher view) pair.

        Args:
            student_output_list: logits [B, K] for each student view.
            teacher_out_softmaxed_centered_list: targets [B, K] for each teacher view.

        Returns:
            Scalar float32 loss.
        """
        # Cross-entropy is linear in the target, so all teacher views of a row can be added first.
        targets = sum(teacher_out_softmaxed_centered_list)
        return sum(
            soft_cross_entropy(logits, targets, self.student_temp).mean() for logits in student_output_list
        )

    def _center_rows(self, teacher_logits: Tensor) -> Tensor:
        return teacher_logits
