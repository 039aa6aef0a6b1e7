"""Scores of features against prototypes."""

import torch
import torch.nn.functional as F
from torch import Tensor

# Prototypes per product on a CPU. A block of so many scores stays in its caches while it is summed up; one
# product with 65,536 prototypes ran at two thirds of the rate.
COLUMNS = 512


def prototype_scores(features: Tensor, prototypes: Tensor) -> Tensor:
    """Return ``features @ prototypes.T``, on a CPU in several products in float32 without autograd.

    Args:
        features: [..., d].
        prototypes: [K, d], of the same format.

    Returns:
        [..., K].
    """
    watched = torch.is_grad_enabled() and (features.requires_grad or prototypes.requires_grad)
    pays = features.device.type == "cpu" and features.dtype == torch.float32 and features.dim() > 1
    if watched or not pays or torch.is_autocast_enabled("cpu"):
        return F.linear(features, prototypes)
    scores = features.new_empty(*features.shape[:-1], len(prototypes))
    rows, columns = features.flatten(0, -2), scores.flatten(0, -2).split(COLUMNS, dim=1)
    for some, part in zip(prototypes.split(COLUMNS), columns, strict=True):
        torch.mm(rows, some.T, out=part)
    return scores
