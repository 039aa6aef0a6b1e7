"""Scores of predicted classes against labels, their bootstrap intervals, and the comparison of two models.

Letters: S samples, C classes, B bootstrap draws. Everything is a share from 0 to 1, kappa from -1 to 1.

Rules where implementations differ:

- Recall counts classes that occur among the labels, and so does balanced accuracy, their mean. F1 counts
  classes that occur among labels or predictions; macro F1 is their mean, weighted F1 goes by the labels.
- The Jaccard index of a class is the share of hits among samples of it or predicted as it; the mean is that
  of the classes of macro F1.
- The area under the ROC curve (AUROC) sets each class against all others, equal scores counting half; the
  mean leaves out classes that all samples or none belong to. With two classes it is that of class 1.
- The distance of two classes in quadratic kappa is that of their numbers.
- A bootstrap draw takes S of the S samples with replacement, whatever their class; each score of a draw
  follows the rules above. Draws in which a score is not defined are left out of its interval.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinov2.errors import DatasetError
from dinov2.eval.metrics import top_classes

logger = logging.getLogger("dinov2")

DRAWS = 1000
LEVEL = 0.95
SCORES = (
    "accuracy",
    "balanced_accuracy",
    "macro_f1",
    "weighted_f1",
    "auroc",
    "quadratic_kappa",
    "macro_jaccard",
)

# Sums of weights are exact in float32 below 2**24, and blocks of draws are this many weights: 16 MiB.
BLOCK_WEIGHTS = 4_194_304
# One AUROC interval costs samples x classes x draws additions; above this many it is left out.
MOST_AUROC_ADDITIONS = 2e9


@dataclass(frozen=True)
class Predictions:
    """What a model says of samples whose classes are known, on the CPU.

    Args:
        labels: Class numbers (S,).
        scores: Class scores (S, C), of which the largest, the first of equals, is the prediction. AUROC
            compares them between samples, so they should be probabilities or have another common scale.

    Raises:
        DatasetError: There are no samples, a label is not one of the classes, or a score is not finite.
    """

    labels: Tensor
    scores: Tensor

    def __post_init__(self) -> None:
        num_classes = self.num_classes
        if not len(self.labels):
            raise DatasetError("there are no samples to score: evaluation needs labelled images")
        unknown = self.labels[(self.labels < 0) | (self.labels >= num_classes)]
        if len(unknown):
            raise DatasetError(
                f"the label {unknown[0].item()} is not among the classes 0..{num_classes - 1} of the "
                "training data: evaluate on a dataset with the same classes"
            )
        broken = ~self.scores.isfinite().all(dim=1)
        if broken.any():
            raise DatasetError(
                f"the class scores of {int(broken.sum())} of {len(broken)} samples are not finite: check the "
                "features, or lower the learning rates"
            )

    @property
    def num_classes(self) -> int:
        """C."""
        return self.scores.shape[1]

    @cached_property
    def predicted(self) -> Tensor:
        """The predicted classes (S,)."""
        return top_classes(self.scores, 1)[:, 0]


def confusion_matrix(predictions: Predictions) -> Tensor:
    """Return how many samples of each class (rows) were given each class (columns), int64 (C, C)."""
    num_classes = predictions.num_classes
    cells = predictions.labels * num_classes + predictions.predicted
    return cells.bincount(minlength=num_classes**2).view(num_classes, num_classes)


def per_class_scores(predictions: Predictions) -> dict[str, list[float]]:
    """Return ``support`` (samples), ``recall``, ``precision``, ``f1`` and ``auroc`` of every class.

    A class without samples has no recall and no AUROC, one that is never predicted either has no F1 (NaN).
    The precision of a class that has samples and is never predicted is 0.
    """
    counts = _count(predictions, torch.ones(len(predictions.labels), 1))
    support, predicted, hits = (part[:, 0] for part in counts)
    occurs = support + predicted > 0
    absent = torch.full_like(support, torch.nan)
    return {
        "support": support.long().tolist(),
        "recall": (hits / support).tolist(),
        "precision": torch.where(occurs, hits / predicted.clamp(min=1), absent).tolist(),
        "f1": torch.where(occurs, 2 * hits / (support + predicted), absent).tolist(),
        "auroc": [
            _area(predictions, number, torch.ones(len(predictions.labels), 1)).item()
            for number in range(predictions.num_classes)
        ],
    }


def score(predictions: Predictions) -> dict[str, float]:
    """Return the :data:`SCORES`; one that is not defined, such as AUROC with one class, is NaN."""
    found = _weighted_scores(predictions, torch.ones(len(predictions.labels), 1), with_auroc=True)
    return {name: values.item() for name, values in found.items()}


def bootstrap(predictions: Predictions, draws: int = DRAWS, seed: int = 0) -> dict[str, Tensor]:
    """Return the :data:`SCORES` of ``draws`` resampled sets of samples, float64 (B,) each.

    The same seed and number of samples give the same draws, so the scores of two models on the same samples
    are paired. AUROC is NaN where it would take too long (:data:`MOST_AUROC_ADDITIONS`).
    """
    count = len(predictions.labels)
    with_auroc = count * predictions.num_classes * draws <= MOST_AUROC_ADDITIONS
    if not with_auroc:
        logger.info("no interval of AUROC: %d samples of %d classes", count, predictions.num_classes)
    parts = [
        _weighted_scores(predictions, weights, with_auroc=with_auroc)
        for weights in draw_weights(count, draws, seed)
    ]
    return {name: torch.cat([part[name] for part in parts]) for name in SCORES}


def interval(values: Tensor, level: float = LEVEL) -> list[float]:
    """Return the percentile interval ``[low, high]`` of the draws (B,) that are defined, NaN if none is."""
    defined = values[values.isfinite()].numpy()
    if not len(defined):
        return [float("nan"), float("nan")]
    return np.quantile(defined, [(1 - level) / 2, (1 + level) / 2]).tolist()


def paired_bootstrap(
    first: Predictions, second: Predictions, draws: int = DRAWS, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Compare two models on the same samples: what does the second gain over the first?

    Returns:
        By score: ``first``, ``second``, ``difference`` (second minus first), its 95 % ``interval``, and
        ``p_value``, twice the smaller share of draws in which the difference is at most or at least 0.

    Raises:
        DatasetError: The labels of the samples differ.
    """
    if not torch.equal(first.labels, second.labels):
        raise DatasetError(
            f"the predictions are not of the same samples ({len(first.labels)} and {len(second.labels)}, "
            "with other labels): compare two models on one dataset, in its order"
        )
    own, other = score(first), score(second)
    drawn, drawn_other = bootstrap(first, draws, seed), bootstrap(second, draws, seed)
    table = {}
    for name in SCORES:
        gains = drawn_other[name] - drawn[name]
        gains = gains[gains.isfinite()].round(decimals=12)  # equal models differ by rounding alone
        tails = ((gains <= 0).double().mean().item(), (gains >= 0).double().mean().item())
        table[name] = {
            "first": own[name],
            "second": other[name],
            "difference": other[name] - own[name],
            "interval": interval(gains),
            "p_value": min(1.0, 2 * min(tails)) if len(gains) else float("nan"),
        }
    return table


def draw_weights(count: int, draws: int, seed: int) -> Iterator[Tensor]:
    """Yield blocks (S, b) of how often each sample is in each draw, float32."""
    generator = np.random.default_rng(seed)
    block = max(1, BLOCK_WEIGHTS // count)
    for start in range(0, draws, block):
        size = min(block, draws - start)
        rows = generator.integers(0, count, size=(size, count)) + np.arange(size)[:, None] * count
        times = np.bincount(rows.ravel(), minlength=size * count).reshape(size, count)
        yield torch.from_numpy(times.T.astype(np.float32))


def _count(predictions: Predictions, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return per class the weight of its samples, of its predictions and of its hits, float64 (C, B) each."""
    labels, predicted = predictions.labels, predictions.predicted
    hit = labels == predicted
    zeros = weights.new_zeros(predictions.num_classes, weights.shape[1])
    return (
        zeros.index_add(0, labels, weights).double(),
        zeros.index_add(0, predicted, weights).double(),
        zeros.index_add(0, labels[hit], weights[hit]).double(),
    )


def _weighted_scores(predictions: Predictions, weights: Tensor, *, with_auroc: bool) -> dict[str, Tensor]:
    """Return the :data:`SCORES` (B,) of samples that count ``weights`` (S, B) times."""
    support, predicted, hits = _count(predictions, weights)
    total = support.sum(dim=0)
    f1 = 2 * hits / (support + predicted)  # NaN for classes that do not occur
    return {
        "accuracy": hits.sum(dim=0) / total,
        "balanced_accuracy": (hits / support).nanmean(dim=0),
        "macro_f1": f1.nanmean(dim=0),
        "weighted_f1": (f1.nan_to_num() * support).sum(dim=0) / total,
        "auroc": _mean_area(predictions, weights) if with_auroc else torch.full_like(total, torch.nan),
        "quadratic_kappa": _quadratic_kappa(predictions, weights, support, predicted),
        "macro_jaccard": (hits / (support + predicted - hits)).nanmean(dim=0),
    }


def _quadratic_kappa(predictions: Predictions, weights: Tensor, support: Tensor, predicted: Tensor) -> Tensor:
    squares = (predictions.labels - predictions.predicted).double().square()
    observed = squares @ weights.double()
    total = support.sum(dim=0)
    numbers = torch.arange(len(support), dtype=torch.float64)
    # The mean square distance of a label and a prediction drawn independently, from their moments.
    expected = (
        (numbers.square() @ support)
        + (numbers.square() @ predicted)
        - 2 * (numbers @ support) * (numbers @ predicted) / total
    )
    return 1 - observed / expected


def _mean_area(predictions: Predictions, weights: Tensor) -> Tensor:
    numbers = range(predictions.num_classes) if predictions.num_classes != 2 else [1]
    return torch.stack([_area(predictions, number, weights) for number in numbers]).nanmean(dim=0)


def _area(predictions: Predictions, number: int, weights: Tensor) -> Tensor:
    """Return the area under the ROC curve of one class against the others (B,), NaN without both."""
    scores = predictions.scores[:, number].contiguous()
    positive = predictions.labels == number
    levels, level_of = scores[positive].unique(return_inverse=True)  # ascending
    # Per level of the positives: their weight, that of the negatives right below it, and at it.
    won = weights.new_zeros(len(levels), weights.shape[1]).index_add_(0, level_of, weights[positive])
    above = torch.searchsorted(levels, scores, right=True)  # the first level above each score
    spare = len(levels) + 1  # where the positives go, which are no negatives
    below = weights.new_zeros(spare + 1, weights.shape[1])
    below.index_add_(0, above.masked_fill(positive, spare), weights)
    below = below[:spare].cumsum(dim=0)
    tied = ((above > 0) & ~positive).nonzero()[:, 0]
    tied = tied[levels[above[tied] - 1] == scores[tied]]
    beaten = below[:-1].double()
    beaten.index_add_(0, above[tied] - 1, weights[tied].double() / 2)
    won = won.double()
    return (won * beaten).sum(dim=0) / (won.sum(dim=0) * below[-1].double())
