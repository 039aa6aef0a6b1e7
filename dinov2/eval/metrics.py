"""Top-k accuracies that count hits per class and add the counts of all processes up before dividing.

Shapes: B samples, C classes, A labels per sample. A class score that is not finite makes its sample a miss,
and among equal scores the lower class index comes first, so that no result depends on the device.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum

import torch
from torch import Tensor
from torch.nn import functional

from dinov2 import distributed
from dinov2.errors import DatasetError

NO_LABEL = -1
NO_CLASS = -2


class MetricType(Enum):
    """The accuracies a command line can ask for, by value."""

    MEAN_ACCURACY = "mean_accuracy"
    MEAN_PER_CLASS_ACCURACY = "mean_per_class_accuracy"
    PER_CLASS_ACCURACY = "per_class_accuracy"
    IMAGENET_REAL_ACCURACY = "imagenet_real_accuracy"

    @property
    def accuracy_averaging(self) -> "AccuracyAveraging | None":
        """The averaging of the same name; None where a sample can have several labels."""
        return getattr(AccuracyAveraging, self.name, None)


class AccuracyAveraging(Enum):
    """How the hits of single classes become one number."""

    MEAN_ACCURACY = "micro"
    MEAN_PER_CLASS_ACCURACY = "macro"
    PER_CLASS_ACCURACY = "none"


def top_classes(scores: Tensor, k: int) -> Tensor:
    """Return the ``k`` best classes of each row of ``scores`` (B, C), best first: (B, k)."""
    top = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
    return top.masked_fill(~scores.isfinite().all(dim=1, keepdim=True), NO_CLASS)


def balanced_accuracy(pred: Tensor, target: Tensor, num_classes: int) -> float:
    """Return the mean recall over the classes that occur in ``target`` (``0..1``).

    Args:
        pred: Predicted classes (B,).
        target: True classes (B,), ``0..num_classes - 1``.
    """
    metric = TopKAccuracy(num_classes, average="macro")
    metric.update(functional.one_hot(pred, num_classes), target)
    return metric.compute(synchronize=False).item()


class CountingMetric:
    """Counts that batches add to and that are summed over processes when the value is asked for."""

    def __init__(self, counts: Tensor) -> None:
        self.counts = counts

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count one batch of class scores ``preds`` (B, C) against ``target``."""
        raise NotImplementedError

    def value(self, counts: Tensor) -> Tensor:
        """Turn counts into the metric."""
        raise NotImplementedError

    def compute(self, *, synchronize: bool = True) -> Tensor:
        """Return the metric (``0..1``, NaN without samples), over all processes if ``synchronize``."""
        counts = self.counts
        if synchronize and distributed.is_enabled():
            counts = distributed.all_reduce_sum_(counts.to(distributed.collective_device(), copy=True)).cpu()
        return self.value(counts)

    def reset(self) -> None:
        """Forget every batch."""
        self.counts.zero_()


class TopKAccuracy(CountingMetric):
    """The share of samples whose class is among the ``top_k`` best-scored ones.

    ``micro`` averages over samples. ``macro`` averages the recalls of the classes that occur among the
    targets, which is scikit-learn's balanced accuracy. ``none`` returns all recalls, NaN for absent classes.
    """

    def __init__(self, num_classes: int, top_k: int = 1, average: str = "micro") -> None:
        # Row 0 counts hits, row 1 samples, per class.
        super().__init__(torch.zeros(2, num_classes, dtype=torch.int64))
        self.top_k = top_k
        self.average = AccuracyAveraging(average)

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count one batch of class scores ``preds`` (B, C) against ``target`` (B,).

        Raises:
            DatasetError: A target is not one of the classes.
        """
        num_classes = self.counts.shape[1]
        unknown = target[(target < 0) | (target >= num_classes)]
        if len(unknown):
            raise DatasetError(
                f"the label {unknown[0].item()} is not among the classes 0..{num_classes - 1} of the "
                "training data: evaluate on a dataset with the same classes"
            )
        hit = (top_classes(preds, self.top_k) == target[:, None]).any(dim=1)
        self.counts += torch.stack(
            [target[hit].bincount(minlength=num_classes), target.bincount(minlength=num_classes)]
        ).cpu()

    def value(self, counts: Tensor) -> Tensor:
        if self.average is AccuracyAveraging.MEAN_ACCURACY:
            return counts[0].sum().double() / counts[1].sum()
        recalls = counts[0].double() / counts[1]
        return recalls if self.average is AccuracyAveraging.PER_CLASS_ACCURACY else recalls.nanmean()


class ImageNetReaLAccuracy(CountingMetric):
    """The share of labelled samples one of whose ``top_k`` best-scored classes is among their labels.

    Source: "Are we done with ImageNet?" (Beyer et al. 2020), section 3.
    """

    def __init__(self, num_classes: int, top_k: int = 1) -> None:
        super().__init__(torch.zeros(2, dtype=torch.int64))
        self.num_classes = num_classes
        self.top_k = top_k

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count one batch of scores (B, C) against labels (B, A), padded with -1; all -1 is left out."""
        top = top_classes(preds, self.top_k)
        hit = (top[:, :, None] == target[:, None, :]).flatten(1).any(dim=1)
        labelled = (target > NO_LABEL).any(dim=1)
        self.counts += torch.stack([(hit & labelled).sum(), labelled.sum()]).cpu()

    def value(self, counts: Tensor) -> Tensor:
        return counts[0].double() / counts[1]


class MetricCollection(Mapping[str, CountingMetric]):
    """Metrics by name that are updated, computed and reset together."""

    def __init__(self, metrics: Mapping[str, CountingMetric]) -> None:
        self._metrics = dict(metrics)

    def __getitem__(self, name: str) -> CountingMetric:
        return self._metrics[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._metrics)

    def __len__(self) -> int:
        return len(self._metrics)

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count one batch in every metric."""
        for metric in self.values():
            metric.update(preds, target)

    def compute(self, *, synchronize: bool = True) -> dict[str, Tensor]:
        """Return every metric's value."""
        return {name: metric.compute(synchronize=synchronize) for name, metric in self.items()}

    def reset(self) -> None:
        """Forget every batch."""
        for metric in self.values():
            metric.reset()

    def clone(self) -> "MetricCollection":
        """Return an independent copy."""
        return copy.deepcopy(self)


def build_metric(
    metric_type: MetricType, *, num_classes: int, ks: Sequence[int] | None = None
) -> MetricCollection:
    """Return the metrics ``top-<k>`` of one type.

    Args:
        ks: How many best classes count; None is (1, 5).
    """
    ks = (1, 5) if ks is None else ks
    if metric_type is MetricType.IMAGENET_REAL_ACCURACY:
        return build_topk_imagenet_real_accuracy_metric(num_classes, ks)
    return build_topk_accuracy_metric(metric_type.accuracy_averaging, num_classes, ks)


def build_topk_accuracy_metric(
    average_type: AccuracyAveraging, num_classes: int, ks: Sequence[int] = (1, 5)
) -> MetricCollection:
    """Return one :class:`TopKAccuracy` per k, leaving out those that ``num_classes`` makes meaningless."""
    return MetricCollection(
        {f"top-{k}": TopKAccuracy(num_classes, k, average_type.value) for k in _usable(ks, num_classes)}
    )


def build_topk_imagenet_real_accuracy_metric(
    num_classes: int, ks: Sequence[int] = (1, 5)
) -> MetricCollection:
    """Return one :class:`ImageNetReaLAccuracy` per k, leaving out those above ``num_classes``."""
    return MetricCollection(
        {f"top-{k}": ImageNetReaLAccuracy(num_classes, k) for k in _usable(ks, num_classes)}
    )


def _usable(ks: Sequence[int], num_classes: int) -> list[int]:
    return [k for k in ks if k <= num_classes]
