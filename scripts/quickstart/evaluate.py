"""Scores feature sets by k-NN and a linear probe, with the noise that so few windows bring.

A representation (histogram, random network, backbone before or after) may come in several feature sets, one
per seed; its score is their mean. The unit is balanced accuracy, 0..1.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from torch import Tensor

from dinov2.eval.logistic import fit_logistic_regression
from dinov2.eval.neighbors import knn_predict
from scripts.quickstart.windows import Task

NEIGHBOURS = 5
INVERSE_PENALTY = 1.0
NUM_SUBSETS = 3
SUBSET_SHARE = 0.75
NUM_BOOTSTRAPS = 2000

Features = dict[str, Tensor]  # split -> (n, D)


def _knn(train: Tensor, labels: Tensor, test: Tensor) -> Tensor:
    return knn_predict(train, labels, test, NEIGHBOURS).argmax(dim=1)


def _linear(train: Tensor, labels: Tensor, test: Tensor) -> Tensor:
    mean, std = train.mean(dim=0), train.std(dim=0).clamp(min=1e-6)
    probe = fit_logistic_regression((train - mean) / std, labels, INVERSE_PENALTY)
    return probe.predict((test - mean) / std)


PROBES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"k-NN": _knn, "linear": _linear}


@dataclass(frozen=True)
class Score:
    """Balanced accuracy of one representation on one task with one probe.

    Attributes:
        value: Mean over the seeds.
        noise: Half of the 95 % bootstrap interval over test windows.
        by_seed: One value per feature set.
        subset_spread: Standard deviation over probes fitted to three quarters of the training windows.
        hits: Share of the seeds that got each test window right; what comparisons are made of.
    """

    value: float
    noise: float
    by_seed: list[float]
    subset_spread: float
    hits: np.ndarray = field(repr=False)

    def to_json(self) -> dict:
        """Everything but the single windows, rounded for reading."""
        numbers = asdict(self)
        del numbers["hits"]
        return {key: np.round(value, 4).tolist() for key, value in numbers.items()}


@dataclass(frozen=True)
class Change:
    """Score after minus score before on the same test windows.

    Attributes:
        value: The difference.
        noise: Half of the 95 % interval of the paired bootstrap.
    """

    value: float
    noise: float

    def to_json(self) -> dict:
        """Value, noise and verdict, rounded for reading."""
        return {
            "value": round(self.value, 4),
            "noise": round(self.noise, 4),
            "within_noise": self.within_noise,
        }

    @property
    def within_noise(self) -> bool:
        """Whether these windows cannot tell the difference from none."""
        return abs(self.value) <= self.noise


def score(feature_sets: list[Features], task: Task, probe: str) -> Score:
    """Fit ``probe`` to the training windows of each feature set and score it on the test windows."""
    labels = {split: torch.from_numpy(values) for split, values in task.labels.items()}
    predict = PROBES[probe]
    hits = np.stack([_hits(predict, features, labels) for features in feature_sets])
    truth = task.labels["test"]
    samples = _resample(hits.mean(axis=0), truth)
    subsets = [
        balanced(_hits(predict, features, labels, subset=_subset(task.labels["train"], seed)), truth)
        for features in feature_sets[:1]
        for seed in range(NUM_SUBSETS)
    ]
    return Score(
        value=balanced(hits.mean(axis=0), truth),
        noise=_half_interval(samples),
        by_seed=[balanced(row, truth) for row in hits],
        subset_spread=float(np.std(subsets, ddof=1)),
        hits=hits.mean(axis=0),
    )


def compare(before: Score, after: Score, task: Task) -> Change:
    """Return how much the score changed, with the noise of the difference."""
    difference = after.hits - before.hits
    truth = task.labels["test"]
    return Change(balanced(difference, truth), _half_interval(_resample(difference, truth)))


def balanced(hits: np.ndarray, truth: np.ndarray) -> float:
    """Mean over classes of the mean of ``hits`` (one per test window) within the class."""
    return float(np.mean([hits[truth == label].mean() for label in np.unique(truth)]))


def format_table(
    scores: dict[str, dict[str, dict[str, Score]]], changes: dict[str, dict[str, Change]]
) -> str:
    """Align the scores (task -> representation -> probe) in a small text table."""
    tasks = list(scores)
    representations = list(scores[tasks[0]])
    label_width = max(map(len, [*representations, "after - before"])) + 2
    cell = 14
    lines = [
        " " * label_width + "".join(f"{task:<{cell * len(PROBES)}}" for task in tasks),
        " " * label_width + "".join(f"{probe:<{cell}}" for _ in tasks for probe in PROBES),
    ]
    for name in representations:
        cells = [f"{s.value:5.2f} +-{s.noise:.2f}" for task in tasks for s in scores[task][name].values()]
        lines.append(f"{name:<{label_width}}" + "".join(f"{text:<{cell}}" for text in cells))
    cells = [f"{c.value:+5.2f} +-{c.noise:.2f}" for task in tasks for c in changes[task].values()]
    lines.append(f"{'after - before':<{label_width}}" + "".join(f"{text:<{cell}}" for text in cells))
    return "\n".join(line.rstrip() for line in lines)


def _hits(
    predict: Callable, features: Features, labels: Features, subset: Tensor | None = None
) -> np.ndarray:
    chosen = slice(None) if subset is None else subset
    predicted = predict(features["train"][chosen], labels["train"][chosen], features["test"])
    return (predicted == labels["test"]).double().numpy()


def _subset(labels: np.ndarray, seed: int) -> Tensor:
    """Three quarters of the training windows of each class."""
    generator = np.random.default_rng(seed)
    kept = []
    for label in np.unique(labels):
        rows = generator.permutation(np.flatnonzero(labels == label))
        kept.append(rows[: max(1, round(SUBSET_SHARE * len(rows)))])
    return torch.from_numpy(np.sort(np.concatenate(kept)))


def _resample(values: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Balanced means of ``values`` over test windows drawn anew within each class: (2000,).

    The draws depend on nothing but the labels, so two scores on the same windows are resampled alike.
    """
    generator = np.random.default_rng(0)
    means = []
    for label in np.unique(truth):
        group = values[truth == label]
        means.append(group[generator.integers(len(group), size=(NUM_BOOTSTRAPS, len(group)))].mean(axis=1))
    return np.mean(means, axis=0)


def _half_interval(samples: np.ndarray) -> float:
    low, high = np.percentile(samples, [2.5, 97.5])
    return float(high - low) / 2
