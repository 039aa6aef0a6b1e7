"""Which samples a training run draws, however often it is resumed and on however many processes.

The order is a function of the seed, the type of sampler, the number of samples and the run's *history*: how
many samples each of how many processes has drawn, segment by segment. A checkpoint keeps just that.

What is guaranteed, for any history:

- As long as the number of processes stays, the order is that of
  :class:`~dinov2.data.samplers.InfiniteSampler` or :class:`~dinov2.data.samplers.ShardedInfiniteSampler`, bit
  for bit, wherever it is interrupted and whatever the batch size.
- No pass over the dataset draws a sample twice.
- A pass during which the number of processes changes draws every sample: when it changes, what the passes
  that have begun still lack is put in a row, pass by pass, and dealt out to the new processes in turn. The
  passes that follow are those of the new number of processes. (A pass without a change draws what the sampler
  deals: all samples, of ``sharded_infinite`` all but N mod W.)

Where N mod W is not 0, processes do not reach the end of a pass together: a process of ``infinite`` with
fewer samples is ahead by one more each pass, so that several passes can lack samples at once. "Begun" and
"lack" therefore count per process. What is not drawn when a run ends is left out, as in any run.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, groupby
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Sampler

from dinov2.data.pass_orders import SharedPasses, WholePasses, draw
from dinov2.data.samplers import InfiniteSampler, ShardedInfiniteSampler
from dinov2.errors import WeightsError
from dinov2.utils.log_once import log_once

logger = logging.getLogger("dinov2")

Passes = WholePasses | SharedPasses
# Setting that decides the order -> what it is called in messages.
_IDENTITY = {
    "seed": "train.seed",
    "sampler_type": "train.sampler_type",
    "sample_count": "the number of samples in the dataset",
}


class Segment(NamedTuple):
    """A stretch of a run on one number of processes."""

    world_size: int
    drawn: int  # samples per process


@dataclass(frozen=True)
class DataOrder:
    """The order of a run and how far the run has come in it.

    Args:
        sampler_type: ``infinite`` or ``sharded_infinite``.
        seed: of the order.
        sample_count: samples of the dataset.
        segments: the history, oldest first; no two neighbours have the same number of processes.
        given_up: samples per process drawn before that, from another order.
    """

    sampler_type: str
    seed: int
    sample_count: int
    segments: tuple[Segment, ...] = ()
    given_up: int = 0

    @property
    def position(self) -> int:
        """Samples that a process has drawn since the run began; never less than before.

        With the rank it tells all draws of a run apart, which makes it the seed of their augmentation.
        """
        return self.given_up + sum(segment.drawn for segment in self.segments)

    def advanced(self, world_size: int, drawn: int) -> "DataOrder":
        """Return the order after each of ``world_size`` processes has drawn so many more samples."""
        *earlier, last = self.segments or (Segment(world_size, 0),)
        if last.world_size != world_size:
            earlier, last = [*earlier, last], Segment(world_size, 0)
        segments = (*earlier, Segment(world_size, last.drawn + drawn))
        return replace(self, segments=tuple(segment for segment in segments if segment.drawn))

    def sampler(self, rank: int, world_size: int) -> "OrderSampler":
        """Return the endless stream of indices that a process draws next."""
        return OrderSampler(self, rank, world_size)

    def state(self) -> dict[str, Any]:
        """Return plain values for a checkpoint."""
        identity = {name: getattr(self, name) for name in _IDENTITY}
        segments = [list(segment) for segment in self.segments]
        return {**identity, "segments": segments, "given_up": self.given_up}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "DataOrder":
        """Rebuild what :meth:`state` described.

        Raises:
            WeightsError: it is something else.
        """
        try:
            segments = tuple(Segment(*map(int, segment)) for segment in state["segments"])
            order = cls(**{name: state[name] for name in _IDENTITY}, given_up=int(state["given_up"]))
        except (KeyError, TypeError, ValueError) as error:
            raise WeightsError(
                f"data_order of the checkpoint can not be understood ({error!r}): resume with the version of "
                "this package that wrote it"
            ) from error
        return replace(order, segments=segments)

    def continued(self, stored: Mapping[str, Any]) -> "DataOrder":
        """Return the order of a run that goes on from a stored state, with the settings of this one.

        Where they differ from the stored ones a new order begins, which is logged.

        Args:
            stored: what :meth:`state` returned for the run before.
        """
        before = DataOrder.from_state(stored)
        changes = [
            f"{called} was {getattr(before, name)} and is {getattr(self, name)}"
            for name, called in _IDENTITY.items()
            if getattr(before, name) != getattr(self, name)
        ]
        if not changes:
            return before
        logger.warning(
            "the data order begins anew, from its first pass, because %s; samples that the interrupted pass "
            "has drawn already come again",
            " and ".join(changes),
        )
        return replace(self, segments=(), given_up=before.position)


@dataclass(frozen=True)
class Piece:
    """Samples that a pass lacks: of the processes ``ranks`` the draws ``rows``, in the order of the rows.

    Nothing is listed: an element is computed when it is asked for.
    """

    number: int  # of the pass
    world_size: int
    ranks: range
    rows: range
    begin: int = 0  # elements that have been drawn since

    def __len__(self) -> int:
        return len(self.ranks) * len(self.rows) - self.begin

    def indices(self, passes: Passes, places: np.ndarray) -> np.ndarray:
        """Return the samples at ``places`` of what is left of the piece."""
        rows, ranks = np.divmod(places + self.begin, len(self.ranks))
        return passes.indices(self.number, self.world_size, rows + self.rows.start, ranks + self.ranks.start)


@dataclass(frozen=True)
class Rest:
    """What a change of the number of processes leaves behind."""

    pieces: tuple[Piece, ...] = ()  # still to be drawn, one after the other
    next_pass: int = 0  # the first that nobody has begun

    def __len__(self) -> int:
        return sum(map(len, self.pieces))

    def share(self, rank: int, world_size: int) -> range:
        """Return the places that a process is dealt."""
        return range(rank, len(self), world_size)

    def samples(self, passes: Passes, places: range) -> Iterator[int]:
        """Yield the samples at ``places``, a share or the end of one."""
        begin = 0
        for piece in self.pieces:
            end = begin + len(piece)
            inside = len(range(places.start, min(end, places.stop), places.step))
            part, places = places[:inside], places[inside:]
            local = range(part.start - begin, part.stop - begin, part.step)
            yield from draw(partial(piece.indices, passes), local)
            begin = end

    def after(self, segment: Segment, passes: Passes) -> "Rest":
        """Return what is left once every process of the segment has drawn its share of this and more."""
        world_size, drawn = segment
        pieces = list(_without(self.pieces, drawn * world_size))
        # How many samples of passes proper each process has drawn, and how many it draws in each.
        own = [max(0, drawn - len(self.share(rank, world_size))) for rank in range(world_size)]
        by_rank = [(count, passes.length(rank, world_size)) for rank, count in enumerate(own)]
        first_lacking = min(count // length for count, length in by_rank)
        first_fresh = max(-(-count // length) for count, length in by_rank)
        for ahead in range(first_lacking, first_fresh):
            drawn_rows = [min(max(0, count - ahead * length), length) for count, length in by_rank]
            pieces += _lacking(passes, self.next_pass + ahead, drawn_rows)
        return Rest(tuple(pieces), self.next_pass + first_fresh)


def _without(pieces: Sequence[Piece], count: int) -> Iterator[Piece]:
    """Yield what is left when the first ``count`` elements have been drawn."""
    for piece in pieces:
        if count < len(piece):
            yield replace(piece, begin=piece.begin + count)
        count = max(0, count - len(piece))


def _lacking(passes: Passes, number: int, drawn_rows: list[int]) -> Iterator[Piece]:
    """Yield what a pass lacks, where processes next to each other have come as far, in one piece."""
    world_size = len(drawn_rows)
    # With the row of those that were not dealt.
    all_rows = [len(range(rank, passes.sample_count, world_size)) for rank in range(world_size)]
    rows = [range(drawn, end) for drawn, end in zip(drawn_rows, all_rows, strict=True)]
    for missing, ranks in groupby(range(world_size), key=rows.__getitem__):
        members = list(ranks)
        if missing:
            yield Piece(number, world_size, range(members[0], members[-1] + 1), missing)


class OrderSampler(Sampler[int]):
    """The endless stream of one process: its part of what earlier segments left, then its own passes.

    Replaying the history takes no memory and next to no time. Drawing what was left computes it in chunks; up
    to the limit of recorded orders it holds a shuffled pass, at most 128 MiB, until that is drawn.

    Args:
        order: the order, and how far the run has come.
        rank: of the process.
        world_size: number of processes from here on.

    Raises:
        DatasetError: there are fewer samples than processes.
    """

    def __init__(self, order: DataOrder, rank: int, world_size: int) -> None:
        earlier, drawn = order.segments, 0
        if earlier and earlier[-1].world_size == world_size:
            earlier, drawn = earlier[:-1], earlier[-1].drawn
        self._kind = WholePasses if order.sampler_type == "infinite" else SharedPasses
        self._options = {"sample_count": order.sample_count, "shuffle": True, "seed": order.seed}
        passes = self._passes()
        self.rest = Rest()
        for segment in earlier:
            self.rest = self.rest.after(segment, passes)
        share = self.rest.share(rank, world_size)
        self._share = share[drawn:]
        own = max(0, drawn - len(share)) + self.rest.next_pass * passes.length(rank, world_size)
        place = {"start": rank, "step": world_size, "advance": own}
        if order.sampler_type == "infinite":
            self._following = InfiniteSampler(**self._options, **place)
        else:
            self._following = ShardedInfiniteSampler(**self._options, **place, advance_per_rank=True)
        if self._share:
            log_once(
                logging.INFO,
                "the number of processes has changed since the last checkpoint: the "
                f"{len(self.rest)} samples that were still to come in the passes begun are drawn first, "
                f"{len(self._share)} of them by this process",
            )

    def __iter__(self) -> Iterator[int]:
        return chain(self.rest.samples(self._passes(), self._share), self._following)

    def _passes(self) -> Passes:
        return self._kind(**self._options)
