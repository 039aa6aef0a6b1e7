"""From the config to an endless stream of collated batches, the same one after a resume."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import DataLoader, Dataset, Sampler

from dinov2 import distributed
from dinov2.data import DataAugmentationDINO, MaskingGenerator, collate_data_and_cast, make_dataset
from dinov2.data.samplers import InfiniteSampler, ShardedInfiniteSampler
from dinov2.data.workers import seed_worker
from dinov2.utils.device import resolve_device
from dinov2.utils.seeding import seed_everything


def no_target(_: Any) -> tuple:
    """Self-supervised training has no targets."""
    return ()


class ReproducibleSamples(Dataset):
    """Seeds each sample's augmentation by where it stands in the run, not by what its worker did before.

    Indexed by (position, index) pairs, as :class:`PositionSampler` yields them.

    Args:
        dataset: map-style dataset whose transform draws from Python's, numpy's or torch's generator.
        seed: seed of the run.
        rank: this process's rank, so that no two ranks augment alike.
    """

    def __init__(self, dataset: Dataset, seed: int, rank: int) -> None:
        self.dataset = dataset
        self.seed = seed
        self.rank = rank

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> Any:
        position, index = key
        seed_everything(self.seed, self.rank, position)
        return self.dataset[index]


class PositionSampler(Sampler):
    """Pairs the indices of an endless sampler with their position in this rank's stream."""

    def __init__(self, sampler: Sampler, first_position: int) -> None:
        self.sampler = sampler
        self.first_position = first_position

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return enumerate(iter(self.sampler), start=self.first_position)


def build_augmentation(cfg: DictConfig) -> DataAugmentationDINO:
    """Return DINOv2's multi-crop augmentation: every key of ``crops`` is an argument by the same name."""
    return DataAugmentationDINO(**OmegaConf.to_container(cfg.crops, resolve=True))


def build_dataset(cfg: DictConfig, *, augmentation: Callable[[Any], Any] | None = None) -> Dataset:
    """Open the training set.

    Args:
        cfg: resolved config.
        augmentation: applied to every image, by default what :func:`build_augmentation` returns.
    """
    return make_dataset(
        dataset_str=cfg.train.dataset_path,
        transform=build_augmentation(cfg) if augmentation is None else augmentation,
        target_transform=no_target,
    )


def build_collate(cfg: DictConfig, dtype: torch.dtype = torch.float32) -> partial:
    """Return the function that turns samples into a batch with block masks."""
    grid = cfg.crops.global_crops_size // cfg.student.patch_size
    mask_generator = MaskingGenerator(
        input_size=(grid, grid),
        max_num_patches=0.5 * grid * grid,
    )
    return partial(
        collate_data_and_cast,
        mask_ratio_tuple=tuple(cfg.ibot.mask_ratio_min_max),
        mask_probability=cfg.ibot.mask_sample_probability,
        dtype=dtype,
        n_tokens=grid * grid,
        mask_generator=mask_generator,
    )


def build_sampler(cfg: DictConfig, dataset: Dataset, start_iteration: int) -> PositionSampler:
    """Return this rank's endless order of tiles, from the batch of ``start_iteration`` on."""
    first_position = start_iteration * cfg.train.batch_size_per_gpu
    shared = {
        "sample_count": len(dataset),
        "shuffle": True,
        "seed": cfg.train.seed,
        "advance": first_position,
    }
    if cfg.train.sampler_type == "infinite":
        sampler = InfiniteSampler(**shared)
    else:
        sampler = ShardedInfiniteSampler(**shared, advance_per_rank=True)
    return PositionSampler(sampler, first_position)


def build_data_loader(
    cfg: DictConfig, dataset: Dataset, start_iteration: int, dtype: torch.dtype = torch.float32
) -> DataLoader:
    """Return the endless loader of this rank's batches, from the batch of ``start_iteration`` on.

    Order and augmentation are functions of ``train.seed``, the rank and the position in the run alone, so a
    resumed run sees what it would have seen. The number of loader workers changes nothing.

    Args:
        cfg: resolved config.
        dataset: what :func:`build_dataset` returns.
        start_iteration: iterations already done.
        dtype: number format of the crops.
    """
    num_workers = cfg.train.num_workers
    return DataLoader(
        ReproducibleSamples(dataset, cfg.train.seed, distributed.get_global_rank()),
        sampler=build_sampler(cfg, dataset, start_iteration),
        batch_size=cfg.train.batch_size_per_gpu,
        num_workers=num_workers,
        pin_memory=resolve_device(cfg.train.device).type == "cuda",
        drop_last=True,
        persistent_workers=num_workers > 0,
        collate_fn=build_collate(cfg, dtype),
        worker_init_fn=seed_worker,
    )
