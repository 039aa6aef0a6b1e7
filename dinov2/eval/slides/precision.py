"""Area under the precision-recall curve, as average precision, with its bootstrap interval.

Letters: S samples, C classes, B bootstrap draws.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dinov2.eval.scores import Predictions, draw_weights


def average_precision(predictions: Predictions) -> float:
    """Return the average precision: the sum over thresholds of the gain in recall times the precision.

    Equal scores share a threshold; nothing is interpolated. With two classes it is that of class 1, with more
    the mean over the classes that occur. NaN without samples of the class.
    """
    return _weighted(predictions, torch.ones(len(predictions.labels), 1)).item()


def bootstrap_average_precision(predictions: Predictions, draws: int, seed: int) -> Tensor:
    """Return the average precision of the draws of :func:`dinov2.eval.scores.bootstrap`, float64 (B,)."""
    parts = [
        _weighted(predictions, weights) for weights in draw_weights(len(predictions.labels), draws, seed)
    ]
    return torch.cat(parts)


def _weighted(predictions: Predictions, weights: Tensor) -> Tensor:
    numbers: Sequence[int] = range(predictions.num_classes) if predictions.num_classes != 2 else [1]
    return torch.stack([_of_class(predictions, number, weights) for number in numbers]).nanmean(dim=0)


def _of_class(predictions: Predictions, number: int, weights: Tensor) -> Tensor:
    """Return the average precision (B,) of one class, with samples that count ``weights`` (S, B) times."""
    scores = predictions.scores[:, number]
    order = scores.argsort(descending=True, stable=True)
    scores, weights = scores[order], weights[order].double()
    hits = weights * (predictions.labels[order] == number)[:, None]
    # The last sample of each group of equal scores stands for the threshold.
    ends = torch.cat([scores[1:] != scores[:-1], torch.ones(1, dtype=torch.bool)])
    taken, found = weights.cumsum(dim=0)[ends], hits.cumsum(dim=0)[ends]
    gained = torch.diff(found, dim=0, prepend=torch.zeros_like(found[:1]))
    # Where nothing is taken yet nothing is gained, and the precision does not matter.
    return (gained * found / taken.clamp(min=1)).sum(dim=0) / found[-1]
