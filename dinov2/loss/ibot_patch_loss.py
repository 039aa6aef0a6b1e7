"""Cross-entropy on masked patch tokens (iBOT, arXiv:2111.07832, equation 2)."""

import torch
from torch import Tensor

from dinov2.loss.centering import CenteredLoss, soft_cross_entropy
from dinov2.loss.targets import sinkhorn_knopp


class iBOTPatchLoss(CenteredLoss):
    """Patch-level term: masked student patches predict the teacher's assignment of the visible patch.

    Shapes: G crops of N patches, of which M are masked; K prototypes.

    Args:
        patch_out_dim: number of prototypes K.
        student_temp: student temperature, > 0.
        center_momentum: share of the old centre kept by an update, 0..1.

    The ``center`` buffer has shape [1, 1, K].
    """

    def __init__(self, patch_out_dim: int, student_temp: float = 0.1, center_momentum: float = 0.9) -> None:
        super().__init__((1, 1, patch_out_dim), student_temp, center_momentum)

    @torch.no_grad()
    def sinkhorn_knopp_teacher(
        self,
        teacher_output: Tensor,
        teacher_temp: float,
        n_masked_patches_tensor: Tensor,
        n_iterations: int = 3,
    ) -> Tensor:
        """Return float32 targets [M, K] from logits [M, K], balanced over the masked patches of all ranks.

        Args:
            teacher_output: [M, K] logits of this rank's masked patches.
            teacher_temp: teacher temperature, > 0.
            n_masked_patches_tensor: [1] number M on this rank; it cancels out of the targets and is not read.
            n_iterations: rounds of scaling, >= 1.
        """
        return sinkhorn_knopp(teacher_output, teacher_temp, n_iterations)

    def forward(self, student_patch_tokens: Tensor, teacher_patch_tokens: Tensor, student_masks_flat: Tensor):
        """Return the loss for dense [G, N, K] logits and targets and a [G, N] bool mask.

        Each crop counts with the mean over its masked patches; the result is the mean over all G crops.
        """
        loss = soft_cross_entropy(student_patch_tokens, teacher_patch_tokens, self.student_temp)
        masks = student_masks_flat.float()
        return ((loss * masks).sum(dim=-1) / masks.sum(dim=-1).clamp_min(1.0)).mean()

    def forward_masked(
        self,
        student_patch_tokens_masked: Tensor,
        teacher_patch_tokens_masked: Tensor,
        student_masks_flat: Tensor,
        n_masked_patches: int | None = None,
        masks_weight: Tensor | None = None,
    ) -> Tensor:
        """Return the loss for the masked patches alone.

        Args:
            student_patch_tokens_masked: [>=M, K] logits; rows past ``n_masked_patches`` are padding.
            teacher_patch_tokens_masked: [>=M, K] targets in the same order.
            student_masks_flat: [G, N] bool; the sum is divided by G, masked crops or not.
            n_masked_patches: M, when the rows are padded.
            masks_weight: [M] weight of each patch; by default 1 / (masked patches of its crop).
        """
        loss = soft_cross_entropy(student_patch_tokens_masked, teacher_patch_tokens_masked, self.student_temp)
        if masks_weight is None:
            per_crop = 1.0 / student_masks_flat.sum(dim=-1).clamp_min(1.0)
            masks_weight = per_crop[:, None].expand_as(student_masks_flat)[student_masks_flat]
        if n_masked_patches is not None:
            loss = loss[:n_masked_patches]
        return (loss * masks_weight).sum() / student_masks_flat.shape[0]

    def _center_rows(self, teacher_logits: Tensor) -> Tensor:
        """[1, M, K] or [M, K] logits give one row, their mean: ranks and chunks count alike, whatever M."""
        if teacher_logits.ndim == 2:
            teacher_logits = teacher_logits[None]
        if teacher_logits.shape[1] == 0:
            return teacher_logits.new_zeros(0, teacher_logits.shape[-1])
        return teacher_logits.mean(dim=1, dtype=torch.float32)
