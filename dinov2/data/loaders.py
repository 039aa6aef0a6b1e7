"""From a dataset string to a dataset, and from a dataset to a loader of batches."""

import inspect
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler

from dinov2 import distributed
from dinov2.data.dataset_string import (
    MixturePart,
    nearest_spelling,
    parse_dataset_string,
    split_mixture,
    unsplit_part_hint,
)
from dinov2.data.datasets import (
    NCTCRC,
    ImageFolder,
    ImageNet,
    ImageNet22k,
    Parquet,
    Pathology,
    Slides,
    WebDataset,
)
from dinov2.data.datasets.CustomImageDataset import CustomImageDataset
from dinov2.data.datasets.mixture import MixtureDataset
from dinov2.data.datasets.path_map import PathMap, explained_paths, map_options
from dinov2.data.loader_errors import WatchedLoader
from dinov2.data.pass_orders import has_recorded_order
from dinov2.data.samplers import EpochSampler, InfiniteSampler, ShardedInfiniteSampler
from dinov2.data.workers import seed_worker, worker_generator, worker_options
from dinov2.errors import ConfigError, DatasetError, nearest

logger = logging.getLogger("dinov2")

DATASETS: dict[str, type] = {
    cls.__name__: cls
    for cls in (
        *(ImageNet, ImageNet22k, Pathology, CustomImageDataset, ImageFolder, NCTCRC),
        *(Slides, WebDataset, Parquet),
    )
}
_TRANSFORM_ARGUMENTS = ("transforms", "transform", "target_transform")


class SamplerType(Enum):
    """How the indices of a loader are drawn, see :mod:`dinov2.data.samplers`."""

    DISTRIBUTED, EPOCH, INFINITE, SHARDED_INFINITE, SHARDED_INFINITE_NEW = range(5)


_INFINITE_TYPES = (SamplerType.INFINITE, SamplerType.SHARDED_INFINITE, SamplerType.SHARDED_INFINITE_NEW)


def make_dataset(
    *,
    dataset_str: str | Sequence[str],
    transform: Callable | None = None,
    target_transform: Callable | None = None,
    path_map: PathMap | Mapping[str, str] | None = None,
) -> Dataset:
    """Build the dataset that a dataset string describes (grammar: :mod:`dinov2.data.dataset_string`).

    Args:
        dataset_str: name and options, e.g. ``Pathology:split=TRAIN:root=/index:extra=/index:sshid=13``, or a
            mixture, ``2*Pathology:...+NCTCRC:...``, also as a list of its parts. Without weights every image
            comes once a pass; with them, they are the shares of the draws, 1 for a part that has none
            (:class:`~dinov2.data.datasets.mixture.MixtureDataset`).
        transform: applied to each PIL image.
        target_transform: applied to each target.
        path_map: where recorded folders lie here (``train.path_map``), for the keys that name paths, such as
            ``root``, and for the paths in the dataset's files; see :mod:`dinov2.data.datasets.path_map`.

    Raises:
        DatasetError: the name or a key is unknown, a key is missing, a folder or file that the dataset
            needs is missing, or the dataset is empty.
    """
    texts = [dataset_str] if isinstance(dataset_str, str) else [str(text) for text in dataset_str]
    parts = [part for text in texts for part in split_mixture(text, DATASETS)]
    if not parts:
        raise DatasetError("the list of dataset strings is empty: give at least one")
    build = partial(
        _make_one,
        transform=transform,
        target_transform=target_transform,
        general_map=PathMap.of(path_map),
    )
    datasets = [_make_part(build, part, number, len(parts)) for number, part in enumerate(parts, 1)]
    if len(datasets) == 1:
        return datasets[0]
    weights = [part.weight for part in parts]
    return MixtureDataset(
        datasets,
        [parse_dataset_string(part.dataset_str)[0] for part in parts],
        [weight or Fraction(1) for weight in weights] if any(weights) else None,
        transform=transform,
        target_transform=target_transform,
    )


def _make_part(build: Callable[[str], Dataset], part: MixturePart, number: int, count: int) -> Dataset:
    """Build one dataset of a mixture; its errors say which part is wrong."""
    try:
        return build(part.dataset_str)
    except DatasetError as error:
        hint = unsplit_part_hint(part.dataset_str, DATASETS)
        place = f"part {number} of {count}: " if count > 1 else ""
        if not hint and not place:
            raise
        raise DatasetError(f"{place}{error}{hint}") from error


def _make_one(
    dataset_str: str,
    *,
    transform: Callable | None,
    target_transform: Callable | None,
    general_map: PathMap,
) -> Dataset:
    name, options = parse_dataset_string(dataset_str)
    if name not in DATASETS:
        raise DatasetError(
            f'Unsupported dataset "{name}"{nearest_spelling(name, DATASETS)}; accepted are '
            f"{', '.join(DATASETS)}"
        )
    dataset_class = DATASETS[name]
    typed = _typed_options(dataset_class, options)
    with explained_paths(options, general_map):
        dataset = dataset_class(
            **map_options(typed, inspect.signature(dataset_class).parameters, general_map),
            transform=transform,
            target_transform=target_transform,
        )
        count = len(dataset)
    logger.info('dataset "%s": %d samples', dataset_str, count)
    if count == 0:
        raise DatasetError(f'the dataset "{dataset_str}" is empty: check its folders and its index')
    # Datasets of other origin may take the transforms without keeping them; evaluation reads them back.
    for attribute, value in (("transform", transform), ("target_transform", target_transform)):
        if not hasattr(dataset, attribute):
            setattr(dataset, attribute, value)
    return dataset


def _typed_options(dataset_class: type, options: dict[str, str]) -> dict[str, Any]:
    """Compare the options with the constructor of the dataset and give each the type of its default."""
    parameters = inspect.signature(dataset_class).parameters
    accepted = {key: p for key, p in parameters.items() if key not in _TRANSFORM_ARGUMENTS}
    for key in options:
        if key not in accepted:
            raise DatasetError(
                f'{dataset_class.__name__} does not know the key "{key}"{nearest(key, accepted)}; accepted '
                f'are {", ".join(accepted)}; a value that holds ":" goes in quotes, or has %3A for it'
            )
    missing = [key for key, p in accepted.items() if p.default is p.empty and key not in options]
    if missing:
        raise DatasetError(
            f"{dataset_class.__name__} needs {', '.join(missing)}: write "
            f"{':'.join([dataset_class.__name__, *(f'{key}=...' for key in accepted if key in options)])}"
            f"{''.join(f':{key}=...' for key in missing)}"
        )
    return {key: _cast(dataset_class, key, value, accepted[key].default) for key, value in options.items()}


def _cast(dataset_class: type, key: str, value: str, default: Any) -> Any:
    wanted = type(default)
    if wanted not in (int, float):
        return value
    try:
        return wanted(value)
    except ValueError as error:
        raise DatasetError(
            f'the key "{key}" of {dataset_class.__name__} is "{value}"; it takes '
            f"{'a whole number' if wanted is int else 'a number'}"
        ) from error


def _make_sampler(
    *,
    dataset: Dataset,
    sampler_type: SamplerType | None,
    shuffle: bool,
    seed: int,
    size: int,
    advance: int,
    reshuffle_globally: bool,
) -> Sampler | None:
    sample_count = len(dataset)
    if size > 0 and sampler_type is not SamplerType.EPOCH:
        raise ConfigError(f"sampler_size is {size}, but only the sampler type EPOCH takes one; use -1")
    if advance > 0 and sampler_type not in _INFINITE_TYPES:
        raise ConfigError(f"sampler_advance is {advance}, but only endless sampler types take one; use 0")
    if reshuffle_globally and sampler_type not in _INFINITE_TYPES[1:]:
        raise ConfigError("reshuffle_globally belongs to the sharded sampler types only; leave it out")
    if sample_count == 0:
        raise DatasetError("the dataset is empty: check its folders and its index")
    order = {"shuffle": shuffle, "seed": seed}
    if sampler_type is SamplerType.DISTRIBUTED:
        replicas, rank = distributed.get_global_size(), distributed.get_global_rank()
        if not has_recorded_order(sample_count):
            # PyTorch's sampler lists all indices; this one deals the same ones, rounded up to equal shares.
            padded = -(-sample_count // replicas) * replicas
            return EpochSampler(size=padded, sample_count=sample_count, **order)
        return DistributedSampler(dataset, replicas, rank, **order, drop_last=False)
    if sampler_type is SamplerType.EPOCH:
        size = size if size > 0 else sample_count
        return EpochSampler(size=size, sample_count=sample_count, **order, mix_seed=True)
    if sampler_type is SamplerType.INFINITE:
        return InfiniteSampler(sample_count=sample_count, **order, advance=advance)
    if sampler_type is None:
        return None
    return ShardedInfiniteSampler(
        sample_count=sample_count,
        **order,
        advance=advance,
        advance_per_rank=True,
        use_new_shuffle_tensor_slice=sampler_type is SamplerType.SHARDED_INFINITE_NEW,
        reshuffle_globally=reshuffle_globally,
    )


def make_data_loader(
    *,
    dataset: Dataset,
    batch_size: int,
    num_workers: int,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    drop_last: bool = True,
    persistent_workers: bool = False,
    sampler_type: SamplerType | None = SamplerType.INFINITE,
    shuffle: bool = True,
    seed: int = 0,
    sampler_size: int = -1,
    sampler_advance: int = 0,
    reshuffle_globally: bool = False,
    worker_seed: int | None = None,
    timeout: float = 0,
    prefetch_factor: int | None = None,
    multiprocessing_context: str | None = None,
) -> DataLoader:
    """Build the loader of this process's batches.

    Worker processes seed Python, numpy and torch from (seed, rank, worker), so no two processes or workers
    augment alike. With ``num_workers=0`` the randomness is that of the calling process.

    Args:
        dataset: map-style dataset.
        batch_size: samples per batch and process.
        num_workers: processes that read and augment; 0 does it in this one.
        shuffle: draw the samples in a random order.
        seed: of the order.
        sampler_type: how indices are drawn; None reads the dataset from front to back in every process.
        sampler_size: samples per epoch over all processes for EPOCH; -1 is the size of the dataset.
        sampler_advance: samples that this process has drawn already and the endless types leave out.
        drop_last: leave out a last batch that is not full.
        persistent_workers: keep the workers between epochs.
        collate_fn: list of samples -> batch; None stacks tensors.
        reshuffle_globally: deal the samples anew to the processes for every pass (sharded types).
        worker_seed: of the workers' randomness; None means ``seed``.
        timeout: seconds to wait for a batch before the loader gives up; 0 waits for ever.
        prefetch_factor: batches that each worker prepares ahead; None is PyTorch's default.
        multiprocessing_context: ``fork``, ``spawn`` or ``forkserver``; None is the platform's default.

    Raises:
        ConfigError: sampler options that do not go together.
        DatasetError: the dataset is empty or smaller than the number of processes.
    """
    sampler = _make_sampler(
        dataset=dataset,
        sampler_type=sampler_type,
        shuffle=shuffle,
        seed=seed,
        size=sampler_size,
        advance=sampler_advance,
        reshuffle_globally=reshuffle_globally,
    )
    with warnings.catch_warnings():
        # More processes than cores pay off where storage is slow; PyTorch warns of them with every loader.
        warnings.filterwarnings("ignore", "This DataLoader will create")
        loader = WatchedLoader(
            dataset,
            sampler=sampler,
            batch_size=batch_size,
            # Page-locked memory only serves copies to an accelerator; without one PyTorch warns.
            pin_memory=torch.cuda.is_available(),
            drop_last=drop_last,
            collate_fn=collate_fn,
            worker_init_fn=seed_worker,
            generator=worker_generator(seed if worker_seed is None else worker_seed, sampler_advance),
            **worker_options(
                num_workers,
                timeout=timeout,
                prefetch_factor=prefetch_factor,
                start_method=multiprocessing_context or "default",
                persistent=persistent_workers,
            ),
        )
    logger.debug("data loader: %d samples, batches of %d, %s", len(dataset), batch_size, sampler_type)
    return loader
