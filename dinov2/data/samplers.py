"""Index streams for distributed training, in the orders that upstream DINOv2 draws them.

Process ``start`` of ``step`` takes every ``step``-th index. The endless streams restart at their beginning
each time they are iterated; a resumed run asks for a stream that starts further on (``advance``).
"""

import itertools
import logging
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler

from dinov2 import distributed
from dinov2.errors import DatasetError
from dinov2.utils.seeding import derive_seed

logger = logging.getLogger("dinov2")

# Indices are turned into Python integers in pieces of this size: a list of a whole pass over millions of
# samples would need ten times the memory of the array.
CHUNK = 1 << 16


class EpochSampler(Sampler[int]):
    """One finite epoch of ``size`` indices, shared between the processes.

    With ``size`` above ``sample_count`` indices repeat, each equally often up to one.

    Args:
        size: indices per epoch over all processes.
        sample_count: samples of the dataset.
        shuffle: draw a new order each epoch.
        seed: of the order.
        start: first position this process takes; None means its rank.
        step: stride between its positions; None means the number of processes.
        mix_seed: upstream multiplies seed and epoch, so that epoch 0 has the same order for every seed.
            True mixes both; the order for seed 0 stays the same.
    """

    def __init__(
        self,
        *,
        size: int,
        sample_count: int,
        shuffle: bool = False,
        seed: int = 0,
        start: int | None = None,
        step: int | None = None,
        mix_seed: bool = False,
    ) -> None:
        self._size = size
        self._sample_count = sample_count
        self._shuffle = shuffle
        self._seed = seed
        self._start, self._step = _share(start, step)
        self._mix_seed = mix_seed
        self._epoch = 0
        _check_sample_count(sample_count, 1)

    def __len__(self) -> int:
        return (self._size - self._start + self._step - 1) // self._step

    def __iter__(self) -> Iterator[int]:
        repeats = -(-self._size // self._sample_count)
        order = np.tile(np.arange(self._sample_count), repeats)
        if self._shuffle:
            order = np.random.default_rng(self._epoch_seed()).choice(order, self._size, replace=False)
        return _integers(order[self._start : self._size : self._step])

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration has."""
        self._epoch = epoch

    def _epoch_seed(self) -> int | list[int]:
        if self._seed == 0:
            return self._epoch
        return [self._seed, self._epoch] if self._mix_seed else self._seed * self._epoch


class InfiniteSampler(Sampler[int]):
    """Endless passes over all samples, each in a new order, shared between the processes.

    Args:
        sample_count: samples of the dataset.
        shuffle: draw a new order each pass.
        seed: of the orders.
        start: first position of a pass that this process takes; None means its rank.
        step: stride between its positions; None means the number of processes.
        advance: indices of this process's stream to leave out at the beginning, that is the number of
            samples it has drawn already. Left-out passes only draw their random numbers.

    Raises:
        DatasetError: there are fewer samples than processes.
    """

    def __init__(
        self,
        *,
        sample_count: int,
        shuffle: bool = False,
        seed: int = 0,
        start: int | None = None,
        step: int | None = None,
        advance: int = 0,
    ) -> None:
        self._sample_count = sample_count
        self._shuffle = shuffle
        self._seed = seed
        self._start, self._step = _share(start, step)
        self._advance = advance
        _check_sample_count(sample_count, self._step)

    def __iter__(self) -> Iterator[int]:
        per_pass = len(range(self._start, self._sample_count, self._step))
        skipped_passes, offset = divmod(self._advance, per_pass)
        generator = torch.Generator().manual_seed(self._seed)
        if self._shuffle:
            for _ in range(skipped_passes):
                torch.empty(self._sample_count, dtype=_index_dtype(self._sample_count)).random_(
                    generator=generator
                )
        while True:
            order = self._order(generator)[self._start :: self._step]
            yield from _integers(order[offset:])
            offset = 0

    def _order(self, generator: torch.Generator) -> np.ndarray:
        """The next pass; the recorded order draws one number per sample, the last of which is moot."""
        dtype = _index_dtype(self._sample_count)
        if not self._shuffle:
            return torch.arange(self._sample_count, dtype=dtype).numpy()
        order = torch.randperm(self._sample_count, dtype=dtype, generator=generator)
        torch.randint(1, (1,), generator=generator)
        return order.numpy()


class ShardedInfiniteSampler(Sampler[int]):
    """Endless passes over a fixed share of the samples, the share in a new order each pass.

    The samples are dealt to the processes once. When they do not divide evenly the rest is never drawn,
    unless ``reshuffle_globally`` deals anew for every pass.

    Args:
        sample_count: samples of the dataset.
        shuffle: shuffle the deal and every pass.
        seed: of both.
        start: which share this process takes; None means its rank.
        step: number of shares; None means the number of processes.
        advance: where to start, in upstream's unit: ``advance // sample_count`` passes of this process
            plus ``advance % sample_count`` of its indices. With one process that is the number of indices
            left out; with more it is not, because a pass of one process is shorter.
        use_new_shuffle_tensor_slice: upstream's second, faster way of shuffling, which gives other orders.
        advance_per_rank: ``advance`` counts indices of this process's stream, that is the samples it has
            drawn already, whatever the number of processes.
        reshuffle_globally: deal all samples anew for every pass, so that every process sees all of them.

    Raises:
        DatasetError: there are fewer samples than processes.
    """

    def __init__(
        self,
        *,
        sample_count: int,
        shuffle: bool = False,
        seed: int = 0,
        start: int | None = None,
        step: int | None = None,
        advance: int = 0,
        use_new_shuffle_tensor_slice: bool = False,
        advance_per_rank: bool = False,
        reshuffle_globally: bool = False,
    ) -> None:
        self._sample_count = sample_count
        self._shuffle = shuffle
        self._seed = seed
        self._start, self._step = _share(start, step)
        self._shuffle_share = _shuffle_by_permutation if use_new_shuffle_tensor_slice else _shuffle_inside_out
        self._reshuffle_globally = reshuffle_globally
        _check_sample_count(sample_count, self._step)
        per_pass = len(range(self._start, sample_count, self._step))
        if shuffle:
            per_pass = sample_count // self._step
            left_out = sample_count % self._step
            if left_out and not reshuffle_globally:
                logger.warning(
                    "%d of %d samples are never drawn: they do not divide evenly between %d processes",
                    *(left_out, sample_count, self._step),
                )
        self._first_pass, self._offset = divmod(advance, per_pass if advance_per_rank else sample_count)
        self._per_pass = per_pass

    def __iter__(self) -> Iterator[int]:
        offset = self._offset
        deal = None
        for number in itertools.count(self._first_pass):
            if deal is None or (self._shuffle and self._reshuffle_globally):
                deal = self._deal(number)
            share = deal[self._start :: self._step][: self._per_pass]
            if self._shuffle:
                # Upstream's formula; only the low 32 bits of a seed count in either generator.
                share = self._shuffle_share(share, self._seed + self._start + (number << 24))
            yield from _integers(share[offset:])
            offset = max(0, offset - self._per_pass)

    def _deal(self, number: int) -> np.ndarray:
        """All samples in the order in which they are dealt; pass 0 has the recorded one."""
        dtype = _index_dtype(self._sample_count)
        if not self._shuffle:
            return torch.arange(self._sample_count, dtype=dtype).numpy()
        dealt_anew = self._reshuffle_globally and number > 0
        seed = derive_seed(self._seed, number) if dealt_anew else self._seed
        generator = torch.Generator().manual_seed(seed)
        return torch.randperm(self._sample_count, dtype=dtype, generator=generator).numpy()


def _share(start: int | None, step: int | None) -> tuple[int, int]:
    return (
        distributed.get_global_rank() if start is None else start,
        distributed.get_global_size() if step is None else step,
    )


def _check_sample_count(sample_count: int, processes: int) -> None:
    # With less than one sample per process the endless streams would search for ever.
    if sample_count < processes:
        raise DatasetError(
            f"the dataset has {sample_count} samples, but at least {processes} are needed, one for each "
            "process: add images or start fewer processes"
        )


def _index_dtype(sample_count: int) -> torch.dtype:
    return torch.int32 if sample_count <= 2**31 else torch.int64


def _integers(order: np.ndarray) -> Iterator[int]:
    for begin in range(0, len(order), CHUNK):
        yield from order[begin : begin + CHUNK].tolist()


def _shuffle_by_permutation(share: np.ndarray, seed: int) -> np.ndarray:
    generator = torch.Generator().manual_seed(seed)
    return share[torch.randperm(len(share), generator=generator).numpy()]


def _shuffle_inside_out(share: np.ndarray, seed: int) -> np.ndarray:
    """Fisher-Yates, inside-out form: item i goes to a random one of the places 0..i and evicts its holder.

    numpy's ``RandomState`` and torch's CPU generator are the same Mersenne Twister, so one call draws what
    upstream draws one by one.
    """
    shuffled = share.copy()
    cells = memoryview(shuffled)  # faster for single items than the array, and no larger, unlike a list
    generator = np.random.RandomState(seed % 2**32)
    for begin in range(1, len(share), CHUNK):
        items = range(begin, min(begin + CHUNK, len(share)))
        draws = generator.randint(0, 2**32, size=len(items), dtype=np.uint32)
        places = draws % np.arange(items.start + 1, items.stop + 1, dtype=np.uint32)
        for item, place in zip(items, places.tolist(), strict=True):
            cells[item], cells[place] = cells[place], cells[item]
    return shuffled
