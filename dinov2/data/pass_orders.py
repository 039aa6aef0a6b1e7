"""The order of the samples within a pass over a dataset, as a function of the pass and the place in it.

Up to ``RECORDED_ORDER_LIMIT`` samples the orders are upstream DINOv2's, for which the whole pass has to be
shuffled in memory. Above it a :class:`~dinov2.data.permutation.Permutation` computes them place by place: no
memory that grows with the dataset, and no way to a far place or pass.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch

from dinov2.data.permutation import Permutation
from dinov2.utils.seeding import derive_seed

# ImageNet-22k, the largest dataset that upstream trained on with these samplers, has 14.2 million samples.
RECORDED_ORDER_LIMIT = 1 << 24

# Indices are turned into Python integers, and computed, in pieces of this size.
CHUNK = 1 << 16

# Places in a pass -> indices into the dataset.
Order = Callable[[np.ndarray], np.ndarray]

# First part of a permutation's key: what it is for.
_WHOLE, _DEAL, _SHARE, _EPOCH = range(4)


def has_recorded_order(sample_count: int) -> bool:
    """Whether the order of so many samples is upstream's."""
    return sample_count <= RECORDED_ORDER_LIMIT


def draw(order: Order, places: range) -> Iterator[int]:
    """Yield the indices at ``places`` of an order, computed in pieces."""
    for begin in range(0, len(places), CHUNK):
        part = places[begin : begin + CHUNK]
        yield from order(np.arange(part.start, part.stop, part.step)).tolist()


class WholePasses:
    """Every pass is one order of all samples, from which process r of W takes every W-th place.

    Args:
        sample_count: samples of the dataset.
        shuffle: a new order each pass.
        seed: of the orders.
    """

    def __init__(self, sample_count: int, shuffle: bool, seed: int) -> None:
        self.sample_count = sample_count
        self._shuffle = shuffle
        self._seed = seed
        self._generator: torch.Generator | None = None
        self._number = -1  # of the pass that _recorded holds
        self._recorded: np.ndarray | None = None

    def length(self, rank: int, world_size: int) -> int:
        """Number of samples that a process draws in a pass."""
        return len(range(rank, self.sample_count, world_size))

    def order(self, number: int) -> Order:
        """Return the order of pass ``number``; a recorded one costs a walk through those before it."""
        if not self._shuffle:
            return lambda places: places
        if not has_recorded_order(self.sample_count):
            return Permutation(self.sample_count, _WHOLE, self._seed, number)
        if self._recorded is None or number != self._number:
            self._recorded = None  # before the next one takes as much
            self._recorded = self._shuffled(number)
        return self._recorded.take

    def indices(self, number: int, world_size: int, rows: np.ndarray, ranks: np.ndarray) -> np.ndarray:
        """Return the indices that the processes ``ranks`` of ``world_size`` draw as their ``rows``-th."""
        return self.order(number)(rows * world_size + ranks)

    def _shuffled(self, number: int) -> np.ndarray:
        """The recorded order draws one number per sample, the last of which is moot."""
        count, dtype = self.sample_count, _index_dtype(self.sample_count)
        if self._generator is None or number <= self._number:
            self._generator, self._number = torch.Generator().manual_seed(self._seed), -1
        for _ in range(self._number + 1, number):
            torch.empty(count, dtype=dtype).random_(generator=self._generator)
        order = torch.randperm(count, dtype=dtype, generator=self._generator)
        torch.randint(1, (1,), generator=self._generator)
        self._number = number
        return order.numpy()


class SharedPasses:
    """The samples are dealt to the processes, and every pass is a new order of each share.

    Args:
        sample_count: samples of the dataset.
        shuffle: shuffle the deal and every share.
        seed: of both.
        use_new_shuffle_tensor_slice: upstream's second way to shuffle a share (of recorded orders only).
        reshuffle_globally: deal anew for every pass.
    """

    def __init__(
        self,
        sample_count: int,
        shuffle: bool,
        seed: int,
        use_new_shuffle_tensor_slice: bool = False,
        reshuffle_globally: bool = False,
    ) -> None:
        self.sample_count = sample_count
        self._shuffle = shuffle
        self._seed = seed
        self._shuffle_share = shuffle_by_permutation if use_new_shuffle_tensor_slice else shuffle_inside_out
        self._reshuffle_globally = reshuffle_globally
        self._dealt: tuple[int, Order] | None = None  # by which number
        self._shares: tuple[tuple[int, int], dict[int, Order]] | None = None  # of which pass and world size

    def length(self, rank: int, world_size: int) -> int:
        """Number of samples that a process draws in a pass: shuffled shares are equal, the rest stays."""
        if self._shuffle:
            return self.sample_count // world_size
        return len(range(rank, self.sample_count, world_size))

    def order(self, number: int, rank: int, world_size: int) -> Order:
        """Return the order in which a process draws its share in pass ``number``."""
        deal = self._deal(number)
        if not self._shuffle:
            return lambda places: places * world_size + rank
        length = self.length(rank, world_size)
        if has_recorded_order(self.sample_count):
            share = deal(np.arange(rank, length * world_size, world_size))
            # Upstream's formula; only the low 32 bits of a seed count in either generator.
            return self._shuffle_share(share, self._seed + rank + (number << 24)).take
        within = Permutation(length, _SHARE, self._seed, rank, number)
        return lambda places: deal(within(places) * world_size + rank)

    def indices(self, number: int, world_size: int, rows: np.ndarray, ranks: np.ndarray) -> np.ndarray:
        """Return the indices that the processes ``ranks`` of ``world_size`` draw as their ``rows``-th.

        The row after the last holds what was left over when the samples were dealt.
        """
        if self._shares is None or self._shares[0] != (number, world_size):
            self._shares = (number, world_size), {}
        shares = self._shares[1]
        found = self._deal(number)(rows * world_size + ranks)
        for rank in np.unique(ranks).tolist():
            chosen = (ranks == rank) & (rows < self.length(rank, world_size))
            if rank not in shares:
                shares[rank] = self.order(number, rank, world_size)
            found[chosen] = shares[rank](rows[chosen])
        return found

    def _deal(self, number: int) -> Order:
        """All samples in the order in which they are dealt; pass 0 has the recorded one."""
        if not self._shuffle:
            return lambda places: places
        dealt_by = number if self._reshuffle_globally else 0
        if self._dealt is None or self._dealt[0] != dealt_by:
            self._dealt = None  # before the next one takes as much
            self._dealt = dealt_by, self._shuffled_deal(dealt_by)
        return self._dealt[1]

    def _shuffled_deal(self, number: int) -> Order:
        if not has_recorded_order(self.sample_count):
            return Permutation(self.sample_count, _DEAL, self._seed, number)
        seed = derive_seed(self._seed, number) if number > 0 else self._seed
        generator = torch.Generator().manual_seed(seed)
        dtype = _index_dtype(self.sample_count)
        return torch.randperm(self.sample_count, dtype=dtype, generator=generator).numpy().take


def epoch_order(sample_count: int, seed: int, epoch: int) -> Order:
    """The order of an epoch above the limit: permutations of all samples in a row, as many as are asked for.

    So every sample comes equally often up to one.
    """

    def order(places: np.ndarray) -> np.ndarray:
        numbers, within = np.divmod(places, sample_count)
        indices = np.empty_like(places)
        for number in np.unique(numbers).tolist():
            chosen = numbers == number
            permutation = Permutation(sample_count, _EPOCH, seed, epoch, number)
            indices[chosen] = permutation(within[chosen])
        return indices

    return order


def _index_dtype(sample_count: int) -> torch.dtype:
    return torch.int32 if sample_count <= 2**31 else torch.int64


def shuffle_by_permutation(share: np.ndarray, seed: int) -> np.ndarray:
    """Upstream's newer way to shuffle a share."""
    generator = torch.Generator().manual_seed(seed)
    return share[torch.randperm(len(share), generator=generator).numpy()]


def shuffle_inside_out(share: np.ndarray, seed: int) -> np.ndarray:
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
