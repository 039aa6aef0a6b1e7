"""Names, addresses and small modules that the released models share."""

import itertools
import math

import torch.nn.functional as F
from torch import Tensor, nn

from dinov2.models.releases import _DINOV2_BASE_URL, _make_dinov2_model_name, release_url

__all__ = ["_DINOV2_BASE_URL", "CenterPadding", "_make_dinov2_model_name", "release_url"]


class CenterPadding(nn.Module):
    """Pad images evenly on both sides, so that height and width become multiples of ``multiple``."""

    def __init__(self, multiple: int) -> None:
        super().__init__()
        self.multiple = multiple

    def forward(self, x: Tensor) -> Tensor:
        """Pad ``[..., H, W]`` with zeros; an odd pixel goes to the right or to the bottom."""
        # F.pad counts from the last axis.
        return F.pad(x, list(itertools.chain.from_iterable(self._margins(size) for size in x.shape[:-3:-1])))

    def _margins(self, size: int) -> tuple[int, int]:
        missing = math.ceil(size / self.multiple) * self.multiple - size
        return missing // 2, missing - missing // 2
