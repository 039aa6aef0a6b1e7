"""Index streams for distributed training, in the orders that upstream DINOv2 draws them.

Process ``start`` of ``step`` takes every ``step``-th index. The endless streams restart at their beginning
each time they are iterated; a resumed run asks for a stream that starts further on (``advance``). Above
``RECORDED_ORDER_LIMIT`` samples, more than upstream's code serves well, the orders are others, which cost no
memory (see :mod:`dinov2.data.pass_orders`).
"""

import itertools
import logging
from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from dinov2 import distributed
from dinov2.data.pass_orders import (
    RECORDED_ORDER_LIMIT,
    Order,
    SharedPasses,
    WholePasses,
    draw,
    epoch_order,
    has_recorded_order,
)
from dinov2.errors import DatasetError
from dinov2.utils.log_once import log_once

__all__ = ["RECORDED_ORDER_LIMIT", "EpochSampler", "InfiniteSampler", "ShardedInfiniteSampler"]


class EpochSampler(Sampler[int]):
    """One finite epoch of ``size`` indices, shared between the processes.

    With ``size`` above ``sample_count`` indices repeat. Orders above the limit mix seed and epoch always, and
    repeat every index equally often up to one.

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
        return draw(self._order(), range(self._start, self._size, self._step))

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration has."""
        self._epoch = epoch

    def _order(self) -> Order:
        count = self._sample_count
        if not self._shuffle:
            return lambda places: places % count
        repeats = -(-self._size // count)
        if not has_recorded_order(repeats * count):
            return epoch_order(count, self._seed, self._epoch)
        order = np.tile(np.arange(count), repeats)
        return np.random.default_rng(self._epoch_seed()).choice(order, self._size, replace=False).take

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
            samples it has drawn already. Left-out passes of a recorded order draw their random numbers.

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
        passes = WholePasses(self._sample_count, self._shuffle, self._seed)
        places = range(self._start, self._sample_count, self._step)
        first_pass, offset = divmod(self._advance, len(places))
        for number in itertools.count(first_pass):
            yield from draw(passes.order(number), places[offset:])
            offset = 0


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
        self._start, self._step = _share(start, step)
        _check_sample_count(sample_count, self._step)
        self._options = (sample_count, shuffle, seed, use_new_shuffle_tensor_slice, reshuffle_globally)
        self._per_pass = SharedPasses(*self._options).length(self._start, self._step)
        left_out = sample_count % self._step
        if shuffle and left_out and not reshuffle_globally:
            log_once(
                logging.WARNING,
                f"the {sample_count} samples do not divide evenly between {self._step} processes: a pass "
                f"draws all but {left_out}, and every pass leaves out the same",
            )
        passes, rest = divmod(advance, self._per_pass if advance_per_rank else sample_count)
        more_passes, self._offset = divmod(rest, self._per_pass)
        self._first_pass = passes + more_passes

    def __iter__(self) -> Iterator[int]:
        passes, offset = SharedPasses(*self._options), self._offset
        for number in itertools.count(self._first_pass):
            order = passes.order(number, self._start, self._step)
            yield from draw(order, range(offset, self._per_pass))
            offset = 0


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
