"""The images that evaluations in the loop look at: opened before the networks are built, read once.

They stay in memory as bytes, each process's share, 147 KiB per image at 224 px: later evaluations then wait
for no storage, cannot fail on an image, and see the same pixels. A few hundred to some thousand images are
meant; more than :data:`MOST_BYTES` are refused.
"""

import hashlib
import logging
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import Dataset, Subset
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from dinov2 import distributed
from dinov2.data import make_dataset
from dinov2.data.loader_errors import WatchedLoader
from dinov2.data.unreadable import read_or_replace, replacement
from dinov2.data.workers import seed_worker, worker_generator, worker_options
from dinov2.errors import DatasetError
from dinov2.eval.data import make_labelled_datasets
from dinov2.train.input import build_dataset, no_target, require_same_length
from dinov2.train.monitoring.slides import SlideSet, open_slide_set

logger = logging.getLogger("dinov2")

MOST_BYTES = 8 * 2**30  # of all images of one process together
SEED = 0  # of the choice of images: runs with different seeds look at the same ones


@dataclass(frozen=True)
class Labelled:
    """Labelled images for k-NN: their datasets by role, ``train`` and ``val``, and their classes.

    Attributes:
        labels: Class numbers (n,) by role.
        num_classes: C.
    """

    datasets: dict[str, Dataset]
    labels: dict[str, Tensor]
    num_classes: int


@dataclass(frozen=True)
class Sources:
    """Opened datasets of which nothing is in memory yet; those that are not asked for are None."""

    monitored: Dataset
    labelled: Labelled | None
    slides: SlideSet | None = None


def monitor_period(cfg: DictConfig) -> int:
    """Return the distance of evaluations in iterations, 0 for none."""
    period = cfg.evaluation.monitor_period
    return max(cfg.evaluation.eval_period_iterations if period is None else period, 0)


def open_sources(cfg: DictConfig) -> Sources | None:
    """Open what evaluations in the loop need; None if there are to be none. All processes call this.

    Raises:
        DatasetError: A dataset is wrong, or labels or slides cannot be used.
    """
    if not monitor_period(cfg):
        return None
    transform = pixels(cfg.crops.global_crops_size)
    if cfg.evaluation.monitor_dataset_path:
        dataset = make_dataset(
            dataset_str=cfg.evaluation.monitor_dataset_path,
            transform=transform,
            target_transform=no_target,
            path_map=cfg.train.path_map,
        )
    else:
        dataset = build_dataset(cfg, augmentation=transform)
    require_same_length(dataset, "set of evaluation.monitor_dataset_path")
    return Sources(
        _Replacing(_chosen(dataset, cfg.evaluation.monitor_samples)),
        _open_labelled(cfg, transform),
        open_slide_set(cfg, transform),
    )


def pixels(size: int) -> Callable[[Any], Tensor]:
    """Return the transform to bytes [3, size, size]: the shorter side to ``size`` pixels, then the centre.

    Of a square tile all is looked at, at the size of the global crops, for which the positions are laid out.
    """
    return transforms.Compose(
        [
            transforms.Resize(size, interpolation=InterpolationMode.BICUBIC),
            transforms.CenterCrop(size),
            transforms.PILToTensor(),
        ]
    )


def _chosen(dataset: Dataset, count: int) -> Dataset:
    if len(dataset) <= count:
        logger.info("evaluations in the loop look at all %d images there are", len(dataset))
        return dataset
    rows = np.random.default_rng(SEED).choice(len(dataset), count, replace=False, shuffle=False)
    return Subset(dataset, sorted(rows.tolist()))


class _Replacing(Dataset):
    """Takes another image for one that cannot be read, and says so."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        draw = read_or_replace(
            self.dataset.__getitem__,
            index,
            lambda attempt: replacement(SEED, 0, index, attempt, len(self.dataset)),
        )
        for failure in draw.failures:
            logger.warning("evaluations in the loop look at another image instead of %s", failure)
        return draw.sample


def _open_labelled(cfg: DictConfig, transform: Callable[[Any], Tensor]) -> Labelled | None:
    strings = {"train": cfg.evaluation.train_dataset_path, "val": cfg.evaluation.val_dataset_path}
    if not any(strings.values()):
        return None
    datasets = make_labelled_datasets(strings, transform, cfg.train.path_map)
    labels = {role: _labels(dataset, strings[role]) for role, dataset in datasets.items()}
    for role, dataset in datasets.items():
        require_same_length(dataset, f"set of evaluation.{role}_dataset_path")
        if (labels[role] < 0).any():
            raise DatasetError(
                f'{int((labels[role] < 0).sum())} of the images of "{strings[role]}" have no label, which '
                f"evaluation.{role}_dataset_path needs: leave them out of the dataset"
            )
    known = labels["train"].unique()
    if len(known) < 2:
        raise DatasetError(
            f'all images of "{strings["train"]}" (evaluation.train_dataset_path) are of one class, so there '
            "is nothing to tell apart: name a dataset with two classes or more, or leave "
            "evaluation.train_dataset_path and val_dataset_path empty"
        )
    unknown = labels["val"][~torch.isin(labels["val"], known)]
    if len(unknown):
        raise DatasetError(
            f'{len(unknown)} images of "{strings["val"]}" (evaluation.val_dataset_path) have classes, such '
            f"as number {int(unknown[0])}, of which evaluation.train_dataset_path has no image: give both "
            "the same classes"
        )
    return Labelled(datasets, labels, int(known.max()) + 1)


def _labels(dataset: Dataset, dataset_str: str) -> Tensor:
    targets = dataset.get_targets() if hasattr(dataset, "get_targets") else None
    if targets is None:
        raise DatasetError(
            f'the dataset "{dataset_str}" cannot list its labels (it has no get_targets()), which '
            "evaluations in the loop need: use a dataset with classes, such as ImageFolder:root=<folder>"
        )
    return torch.from_numpy(np.array(targets, dtype=np.int64))


def require_room(cfg: DictConfig, datasets: Collection[Dataset]) -> None:
    """Check that a process may hold its share of the images of some datasets together.

    Raises:
        DatasetError: They are more than :data:`MOST_BYTES`.
    """
    world, size = distributed.get_global_size(), cfg.crops.global_crops_size
    batches = sum(math.ceil(len(dataset) / cfg.evaluation.batch_size / world) for dataset in datasets)
    held = batches * cfg.evaluation.batch_size * 3 * size * size
    if held > MOST_BYTES:
        raise DatasetError(
            f"{sum(map(len, datasets))} images of {size} px, as evaluations in the loop keep them, take "
            f"{held / 2**30:.0f} GiB in each of {world} processes: name fewer, a few hundred or thousand "
            "are enough for evaluation.monitor_samples, train_dataset_path and val_dataset_path, and as "
            "tiles of all slides (evaluation.slides.max_tiles of each)"
        )


class Images:
    """This process's share of the images of a dataset, in memory.

    The dataset is cut into batches, the same whatever the number of processes, so that features are, too;
    process r of W has the batches r, r + W and so on.

    Args:
        cfg: Resolved config.
        dataset: Of ``(bytes [3, S, S], target)``.

    Attributes:
        batches: Of this process, bytes [b, 3, S, S].
        digest: Of all pixels, the same in all processes.

    Raises:
        DatasetError: One cannot be read.
    """

    def __init__(self, cfg: DictConfig, dataset: Dataset) -> None:
        self.count, self.batch_size = len(dataset), cfg.evaluation.batch_size
        world, rank = distributed.get_global_size(), distributed.get_global_rank()
        size = cfg.crops.global_crops_size
        self.empty = torch.zeros(1, 3, size, size, dtype=torch.uint8)
        rows = [
            range(start, min(start + self.batch_size, self.count))
            for start in range(0, self.count, self.batch_size)
        ]
        self.steps = -(-len(rows) // world)
        loader = WatchedLoader(
            dataset,
            batch_sampler=rows[rank::world],
            collate_fn=_stack_images,
            worker_init_fn=seed_worker,
            generator=worker_generator(SEED),  # of its own: the run's numbers stay as they are
            **worker_options(
                cfg.train.num_workers,
                timeout=cfg.train.worker_timeout,
                prefetch_factor=cfg.train.prefetch_factor,
                start_method=cfg.train.worker_start_method,
                persistent=False,
            ),
        )
        # Copied: what a worker sends lies in shared memory, of which containers have little.
        self.batches = [batch.clone() for batch in loader]
        digests = distributed.all_gather_objects([_digest(batch) for batch in self.batches])
        in_order = [part[step] for step in range(self.steps) for part in digests if step < len(part)]
        self.digest = hashlib.sha256("".join(in_order).encode()).hexdigest()

    def step(self, number: int) -> Tensor:
        """Return this process's batch of a step: all have equally many, at the end a black image."""
        return self.batches[number] if number < len(self.batches) else self.empty


def _stack_images(samples: Sequence[tuple[Tensor, Any]]) -> Tensor:
    return torch.stack([image for image, _ in samples])


def _digest(batch: Tensor) -> str:
    return hashlib.sha256(batch.numpy().tobytes()).hexdigest()
