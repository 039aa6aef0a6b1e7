"""From the config to an endless stream of collated batches, the same one after a resume.

With ``optim.accumulate_steps`` k every process plays k *streams*: what k processes of a run of k times as
many would draw. A step takes one batch, here called micro-batch, of each. Streams are numbered like the
processes of that larger run: process r plays r * k to r * k + k - 1. Data order, augmentation, masks and
stochastic depth depend on the stream's number and know nothing of the processes.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import Dataset, Sampler

from dinov2 import distributed
from dinov2.data import DataAugmentationDINO, MaskingGenerator, collate_data_and_cast, make_dataset
from dinov2.data.data_order import DataOrder
from dinov2.data.loader_errors import WatchedLoader
from dinov2.data.unreadable import CollateDraws, Draw, read_or_replace, replacement
from dinov2.data.workers import seed_worker, worker_options
from dinov2.errors import DatasetError
from dinov2.utils.device import resolve_device
from dinov2.utils.seeding import seed_cpu


def no_target(_: Any) -> tuple:
    """Self-supervised training has no targets."""
    return ()


class ReproducibleSamples(Dataset):
    """Seeds each sample's augmentation by where it stands in the run, not by what its worker did before.

    Indexed by (position, index) pairs, as :class:`PositionSampler` yields them. In the place of a sample that
    can not be read stands another one, which also depends on the place alone.

    Args:
        dataset: map-style dataset whose transform draws from Python's, numpy's or torch's generator.
        seed: seed of the run.
        rank: number of the stream (of the process, where it plays but one), so that no two augment alike.
    """

    def __init__(self, dataset: Dataset, seed: int, rank: int) -> None:
        self.dataset = dataset
        self.seed = seed
        self.rank = rank

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> Any:
        return self.draw(key).sample

    def draw(self, key: tuple[int, int]) -> Draw:
        """Return the sample of a place together with what could not be read there."""
        position, index = key

        def read(index: int) -> Any:
            seed_cpu(self.seed, self.rank, position)
            return self.dataset[index]

        def replace(attempt: int) -> int:
            return replacement(self.seed, self.rank, position, attempt, len(self.dataset))

        return read_or_replace(read, index, replace)


class ReproducibleDraws(ReproducibleSamples):
    """The same samples for the loader: what could not be read travels with them to the main process."""

    def __getitem__(self, key: tuple[int, int]) -> Draw:
        return self.draw(key)


class PositionSampler(Sampler):
    """Pairs the indices of an endless sampler with their position among all that this rank draws in a run."""

    def __init__(self, sampler: Sampler, first_position: int) -> None:
        self.sampler = sampler
        self.first_position = first_position

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return enumerate(iter(self.sampler), start=self.first_position)


class Streams(Dataset):
    """Several streams of samples behind one loader, indexed by (number, key of a sample in that stream)."""

    def __init__(self, streams: Sequence[Dataset]) -> None:
        self.streams = streams

    def __getitem__(self, place: tuple[int, Any]) -> Any:
        number, key = place
        return self.streams[number][key]


class MicroBatchSampler(Sampler):
    """Deals batches of the keys of several endless streams in turn, as :class:`Streams` takes them."""

    def __init__(self, samplers: Sequence[Sampler], batch_size: int) -> None:
        self.samplers = samplers
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[list[tuple[int, Any]]]:
        streams = [iter(sampler) for sampler in self.samplers]
        while True:
            for number, stream in enumerate(streams):
                yield [(number, key) for key in islice(stream, self.batch_size)]


def stream_count(cfg: DictConfig) -> int:
    """Return the number of streams of all processes."""
    return distributed.get_global_size() * cfg.optim.accumulate_steps


def own_streams(cfg: DictConfig) -> range:
    """Return the numbers, among those of all processes, of the streams that this process plays."""
    count = cfg.optim.accumulate_steps
    return range(distributed.get_global_rank() * count, (distributed.get_global_rank() + 1) * count)


def in_steps(micro_batches: Iterable[Any], count: int) -> Iterator[list[Any]]:
    """Group an endless stream of micro-batches into the ``count`` of each step."""
    iterator = iter(micro_batches)
    while step := list(islice(iterator, count)):
        yield step


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
        path_map=cfg.train.path_map,
    )


def require_same_length(dataset: Dataset, name: str = "training set") -> None:
    """Compare the number of samples over all processes, which divide the samples among them by it.

    Args:
        dataset: as each process sees it.
        name: of the dataset, for the error.

    Raises:
        DatasetError: it differs; in every process.
    """
    lengths = distributed.all_gather_objects(len(dataset))
    other = next((rank for rank, length in enumerate(lengths) if length != lengths[0]), None)
    if other is not None:
        raise DatasetError(
            f"the {name} has {lengths[0]} samples in process 0 and {lengths[other]} in process {other}"
            ": see that every machine has the same files and the same index, and start again once nothing "
            "changes them any more"
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


def find_order(
    cfg: DictConfig, dataset: Dataset, start_iteration: int, stored: Mapping[str, Any] | None = None
) -> DataOrder:
    """Return which tiles the run draws, from the batch of ``start_iteration`` on.

    Args:
        cfg: resolved config.
        dataset: what :func:`build_dataset` returns.
        start_iteration: iterations already done.
        stored: ``data_order`` of the checkpoint that the run goes on from. Without it, those iterations count
            as done with the present batch size and number of streams.
    """
    order = DataOrder(cfg.train.sampler_type, cfg.train.seed, len(dataset))
    if stored is not None:
        return order.continued(stored)
    drawn = start_iteration * cfg.train.batch_size_per_gpu
    return order.advanced(stream_count(cfg), drawn)


def build_sampler(
    cfg: DictConfig,
    dataset: Dataset,
    start_iteration: int,
    *,
    order: DataOrder | None = None,
    stream: int | None = None,
) -> PositionSampler:
    """Return the endless order of tiles of a stream, from the batch of ``start_iteration`` on.

    Args:
        cfg, dataset, start_iteration, order: as for :func:`build_data_loader`.
        stream: its number; by default the first that this process plays.
    """
    order = find_order(cfg, dataset, start_iteration) if order is None else order
    number = own_streams(cfg)[0] if stream is None else stream
    return PositionSampler(order.sampler(number, stream_count(cfg)), order.position)


def step_samples(cfg: DictConfig, dataset: Dataset, order: DataOrder) -> list[int]:
    """Return the samples that this process draws in the step at whose beginning ``order`` stands."""
    batch = cfg.train.batch_size_per_gpu
    samplers = [build_sampler(cfg, dataset, 0, order=order, stream=stream) for stream in own_streams(cfg)]
    return [index for sampler in samplers for _, index in islice(sampler, batch)]


def build_data_loader(
    cfg: DictConfig,
    dataset: Dataset,
    start_iteration: int,
    dtype: torch.dtype = torch.float32,
    *,
    order: DataOrder | None = None,
) -> WatchedLoader:
    """Return the endless loader of this rank's micro-batches, from those of ``start_iteration`` on.

    The ``optim.accumulate_steps`` micro-batches of a step follow each other, see :func:`in_steps`. Order,
    augmentation and masks are functions of ``train.seed``, the stream and the position in it alone, so a
    resumed run sees what it would have seen. The number of loader workers changes nothing. After a change of
    the number of streams the run goes on with what they had not drawn (:mod:`dinov2.data.data_order`).
    Batches in which samples had to be replaced have the entry ``unreadable_images``, see
    :mod:`dinov2.data.unreadable`.

    Args:
        cfg: resolved config.
        dataset: what :func:`build_dataset` returns.
        start_iteration: iterations already done.
        dtype: number format of the crops.
        order: what :func:`find_order` returns, by default for a run without a checkpoint.
    """
    samplers = [
        build_sampler(cfg, dataset, start_iteration, order=order, stream=stream)
        for stream in own_streams(cfg)
    ]
    return WatchedLoader(
        Streams([ReproducibleDraws(dataset, cfg.train.seed, stream) for stream in own_streams(cfg)]),
        batch_sampler=MicroBatchSampler(samplers, cfg.train.batch_size_per_gpu),
        pin_memory=resolve_device(cfg.train.device).type == "cuda",
        collate_fn=CollateDraws(build_collate(cfg, dtype)),
        worker_init_fn=seed_worker,
        **worker_options(
            cfg.train.num_workers,
            timeout=cfg.train.worker_timeout,
            prefetch_factor=cfg.train.prefetch_factor,
            start_method=cfg.train.worker_start_method,
        ),
    )
