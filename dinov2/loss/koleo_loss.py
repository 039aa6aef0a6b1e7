"""Spreading features apart: the Kozachenko-Leonenko entropy estimator as a regulariser."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2 import distributed

# Closer than this, the difference of two float32 unit vectors is rounding noise and has no direction.
DUPLICATE_DISTANCE = 1e-6


class KoLeoLoss(nn.Module):
    """-mean(log distance to the nearest neighbour) of L2-normalised features (arXiv:1806.03198).

    Computed in float32 whatever the input's type and outside autocast. Rows that coincide keep the
    estimator's (finite) value but give no gradient: there is no direction to push them in.

    Args:
        scope: ``rank`` looks for neighbours among this process's rows (DINOv2's definition); ``global``
            among the rows of all processes, which makes the loss independent of how a batch is split.
    """

    def __init__(self, *, scope: str = "rank") -> None:
        super().__init__()
        self.scope = scope
        self.pdist = nn.PairwiseDistance(p=2, eps=1e-8)

    def pairwise_NNs_inner(self, x: Tensor) -> Tensor:
        """Return [n] indices of each row's nearest other row, for unit vectors x [n, D]."""
        return self._nearest(x, x, first_row=0)

    def forward(self, student_output: Tensor, eps: float = 1e-8) -> Tensor:
        """Return the scalar loss of features [n, D]; a lone row has no neighbour and gives 0."""
        with torch.autocast(student_output.device.type, enabled=False):
            rows = F.normalize(student_output.float(), eps=eps, p=2, dim=-1)
            candidates, first_row = self._candidates(rows)
            if len(candidates) < 2:
                return rows.sum() * 0.0
            neighbours = candidates[self._nearest(rows, candidates, first_row)]
            distances = self.pdist(rows, neighbours)
            distances = torch.where(distances < DUPLICATE_DISTANCE, distances.detach(), distances)
            return -torch.log(distances + eps).mean()

    def _candidates(self, rows: Tensor) -> tuple[Tensor, int]:
        """Return the rows among which neighbours are sought, and where this rank's rows start in them."""
        if self.scope == "rank" or not distributed.is_enabled():
            return rows, 0
        from torch.distributed.nn.functional import all_gather  # carries gradients to the other ranks' rows

        return torch.cat(all_gather(rows)), distributed.get_global_rank() * len(rows)

    @staticmethod
    @torch.no_grad()
    def _nearest(rows: Tensor, candidates: Tensor, first_row: int) -> Tensor:
        similarity = rows @ candidates.T
        similarity.diagonal(offset=first_row).fill_(-1.0)
        return similarity.argmax(dim=1)
