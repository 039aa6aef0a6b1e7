"""Features of a frozen model, and the loop that scores a model on a validation set.

Shapes: B images per process, n images of a dataset, D width, N patches.
"""

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from dinov2 import distributed
from dinov2.errors import DatasetError, WeightsError
from dinov2.eval.data import make_evaluation_loader
from dinov2.eval.metrics import NO_LABEL, MetricCollection
from dinov2.eval.predictions import PredictionCollector
from dinov2.logging import MetricLogger

logger = logging.getLogger("dinov2")

LOG_PERIOD = 10


class ModelWithNormalize(nn.Module):
    """A model whose outputs (B, D) are scaled to unit length."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, samples: Tensor) -> Tensor:
        """Return unit-length features (B, D)."""
        return functional.normalize(self.model(samples), dim=1, p=2)


class ModelWithIntermediateLayers(nn.Module):
    """The normalised tokens of the last blocks of a frozen backbone.

    Args:
        feature_model: A backbone with ``get_intermediate_layers``.
        n_last_blocks: How many blocks, counted from the last.
        autocast_ctx: Makes the context the backbone runs in.
    """

    def __init__(
        self,
        feature_model: nn.Module,
        n_last_blocks: int,
        autocast_ctx: Callable[[], AbstractContextManager],
    ) -> None:
        super().__init__()
        self.feature_model = feature_model.eval()
        self.n_last_blocks = n_last_blocks
        self.autocast_ctx = autocast_ctx

    def forward(self, images: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
        """Return per block, the last one last, its patch tokens (B, N, D) and its cls token (B, D)."""
        with torch.inference_mode(), self.autocast_ctx():
            return self.feature_model.get_intermediate_layers(
                images, self.n_last_blocks, return_class_token=True
            )


class ModelWithAutocast(nn.Module):
    """A model that computes in another number format and returns float32."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.dtype = dtype

    def forward(self, images: Tensor) -> Tensor:
        """Return the model's output for ``images`` as float32."""
        with autocast_context(images.device, self.dtype):
            return self.model(images).float()


def device_of(model: nn.Module) -> torch.device:
    """Return where the parameters of ``model`` are; the CPU if it has none."""
    return next(model.parameters(), torch.empty(0)).device


def computed_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Return the number format that a device computes in where ``dtype`` is asked for.

    A CPU takes float32 for float16.
    """
    return torch.float32 if device.type == "cpu" and dtype == torch.float16 else dtype


def autocast_context(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Return the context for a forward pass in the :func:`computed_dtype` of ``dtype``."""
    dtype = computed_dtype(device, dtype)
    enabled = dtype != torch.float32
    return torch.autocast(device.type, dtype=dtype if enabled else None, enabled=enabled)


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    data_loader: DataLoader,
    postprocessors: Mapping[str, nn.Module],
    metrics: Mapping[str, MetricCollection],
    device: torch.device,
    criterion: nn.Module | None = None,
    *,
    collectors: Mapping[str, PredictionCollector] | None = None,
) -> tuple[dict[str, float], dict[str, dict[str, Tensor]]]:
    """Run ``model`` over a dataset and compute metrics over all processes.

    Args:
        data_loader: Gives ``(images, targets)``, or ``(images, (indices, targets))`` as
            :func:`~dinov2.eval.data.make_evaluation_loader` does; then samples that the sampler repeats to
            give every process equally many count once.
        postprocessors: By name, turns ``(outputs, targets)`` into a dict with ``preds`` and ``target``.
        metrics: By the same names, what to count.
        device: Where the model is.
        criterion: A loss of ``(outputs, targets)`` to average, too.
        collectors: By the same names, or some of them, what keeps the single predictions. They need the
            indices of :func:`~dinov2.eval.data.make_evaluation_loader`.

    Returns:
        The averages of the logged values, and per name the computed metrics.
    """
    model.eval()
    meters = MetricLogger(delimiter="  ")
    for images, targets in meters.log_every(data_loader, LOG_PERIOD, "Test:"):
        indices = None if isinstance(targets, Tensor) else targets[0]
        own, targets = (part.to(device) for part in _own_samples(targets))
        outputs = model(images.to(device, non_blocking=True))
        if criterion is not None:
            meters.update(loss=criterion(outputs, targets))
        for name, metric in metrics.items():
            batch = postprocessors[name](outputs, targets)
            metric.update(batch["preds"][own], batch["target"][own])
            if collectors and name in collectors:
                collectors[name].update(indices[own.cpu()], batch["preds"][own], batch["target"][own])
    meters.synchronize_between_processes()
    stats = {name: meter.global_avg for name, meter in meters.meters.items()}
    return stats, {name: metric.compute() for name, metric in metrics.items()}


def _own_samples(targets: Any) -> tuple[Tensor, Tensor]:
    """Split off indices; return which samples this process counts (B,) bool, and the targets.

    The distributed sampler deals index i to process i modulo their number, then deals the first few indices
    again until all processes have equally many: such a repeat lands on another process.
    """
    if isinstance(targets, Tensor):
        return torch.ones(len(targets), dtype=torch.bool), targets
    indices, targets = targets
    return indices % distributed.get_global_size() == distributed.get_global_rank(), targets


def all_gather_and_flatten(tensor: Tensor) -> Tensor:
    """Concatenate the tensors (B, ...) of all processes, of one shape, in the order of ranks."""
    if not distributed.is_enabled():
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(distributed.get_global_size())]
    torch.distributed.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def extract_features(
    model: nn.Module, dataset: Dataset, batch_size: int, num_workers: int, gather_on_cpu: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the features of a whole dataset, in its order, on every process.

    Args:
        model: Maps images to features (B, D).
        dataset: Of images with integer labels.
        batch_size: Images per process and step.
        gather_on_cpu: Collect in main memory instead of the memory of the model's device.

    Returns:
        Features (n, D) float32 and labels (n, ...) int64.

    Raises:
        DatasetError: A sample has a negative label.
        WeightsError: The model gives features that are not finite.
    """
    loader = make_evaluation_loader(dataset, batch_size, num_workers)
    return extract_features_with_dataloader(model, loader, len(dataset), gather_on_cpu)


@torch.inference_mode()
def extract_features_with_dataloader(
    model: nn.Module, data_loader: DataLoader, sample_count: int, gather_on_cpu: bool = False
) -> tuple[Tensor, Tensor]:
    """:func:`extract_features` with a loader of :class:`~dinov2.data.DatasetWithEnumeratedTargets`."""
    model.eval()
    device = device_of(model)
    storage_device = torch.device("cpu") if gather_on_cpu else device
    features = labels = None
    meters = MetricLogger(delimiter="  ")
    for images, (indices, targets) in meters.log_every(data_loader, LOG_PERIOD, "Features:"):
        batch = model(images.to(device, non_blocking=True))
        if features is None:
            features = torch.zeros(sample_count, batch.shape[1], device=storage_device)
            labels = torch.full((sample_count, *targets.shape[1:]), NO_LABEL, device=storage_device)
        rows = all_gather_and_flatten(indices.to(device)).to(storage_device)
        features.index_copy_(0, rows, all_gather_and_flatten(batch).to(storage_device))
        labels.index_copy_(0, rows, all_gather_and_flatten(targets.to(device)).to(storage_device))
    _check(features, labels)
    logger.info("features %s, labels %s", tuple(features.shape), tuple(labels.shape))
    return features, labels


def _check(features: Tensor, labels: Tensor) -> None:
    unlabelled = (labels.flatten(1).max(dim=1).values if labels.ndim > 1 else labels) <= NO_LABEL
    if unlabelled.any():
        raise DatasetError(
            f"{int(unlabelled.sum())} of {len(labels)} samples have no label (a negative one), the first is "
            f"sample {int(unlabelled.nonzero()[0])}: leave them out of the dataset"
        )
    broken = ~features.isfinite().all(dim=1)
    if broken.any():
        raise WeightsError(
            f"the features of {int(broken.sum())} of {len(features)} images are not finite: "
            "check the weights, or evaluate in float32 with "
            "--opts compute_precision.teacher.backbone.mixed_precision.param_dtype=fp32"
        )
