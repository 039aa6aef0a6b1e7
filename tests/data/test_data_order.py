"""What a run draws over resumes on other numbers of processes, told from the draws alone."""

import io
import itertools
import logging
import tracemalloc
from collections import defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dinov2.data import pass_orders
from dinov2.data.data_order import DataOrder, Segment
from dinov2.data.samplers import InfiniteSampler, ShardedInfiniteSampler
from dinov2.errors import DatasetError, WeightsError

TYPES = ("infinite", "sharded_infinite")


def first(stream, count):
    return list(itertools.islice(stream, count))


class Ledger:
    """Books every draw of a run to a pass, by the rules that the module states, and complains of errors."""

    def __init__(self, order):
        self.order = order
        self.everything = set(range(order.sample_count))
        self.drawn = defaultdict(set)  # by pass
        self.lacking = []  # passes that a change has interrupted, in the order of drawing
        self.next_pass = 0
        self.keys = set()  # (rank, position) of every draw

    def book(self, number, index):
        assert index not in self.drawn[number], f"pass {number} draws {index} twice"
        assert index in self.everything
        self.drawn[number].add(index)

    def run(self, world, counts):
        """Let ``world`` processes draw, interrupted after each of ``counts``."""
        streams = [[] for _ in range(world)]
        for count in counts:
            for rank in range(world):
                keys = {(rank, self.order.position + i) for i in range(count)}
                assert not keys & self.keys, "the randomness of an earlier draw comes again"
                self.keys |= keys
                streams[rank] += first(self.order.sampler(rank, world), count)
            self.order = self.order.advanced(world, count)
        if sum(counts):
            self._settle(world, streams)

    def _settle(self, world, streams):
        row = [(number, None) for number in self.lacking for _ in self.everything - self.drawn[number]]
        for place, (number, _) in enumerate(row):
            if place // world < len(streams[place % world]):
                self.book(number, streams[place % world][place // world])
        finished = [number for number in self.lacking if len(self.drawn[number]) == len(self.everything)]
        self.lacking = [number for number in self.lacking if number not in finished]
        count = self.order.sample_count
        own = []
        for rank, stream in enumerate(streams):
            part = stream[len(range(rank, len(row), world)) :]
            each = count // world
            if self.order.sampler_type == "infinite":
                each = len(range(rank, count, world))
            for place, index in enumerate(part):
                self.book(self.next_pass + place // each, index)
            own.append((len(part) // each, -(-len(part) // each)))
        ended, begun = min(whole for whole, _ in own), max(some for _, some in own)
        complete = count - (0 if self.order.sampler_type == "infinite" else count % world)
        assert all(len(self.drawn[self.next_pass + n]) == complete for n in range(ended))
        self.lacking += range(self.next_pass + ended, self.next_pass + begun)
        self.next_pass += begun


@st.composite
def histories(draw):
    count = draw(st.integers(1, 40))
    world = st.integers(1, min(count, 5))
    counts = st.lists(st.integers(0, 25), min_size=1, max_size=3)
    segments = draw(st.lists(st.tuples(world, counts), min_size=1, max_size=5))
    # Neighbours with one number of processes are no change; the ledger takes them for one.
    return count, [
        segment for n, segment in enumerate(segments) if n == 0 or segments[n - 1][0] != segment[0]
    ]


@pytest.mark.parametrize("limit", [pass_orders.RECORDED_ORDER_LIMIT, 0], ids=["recorded", "computed"])
@pytest.mark.parametrize("sampler_type", TYPES)
@settings(max_examples=60, deadline=None)
@given(histories(), st.integers(0, 5))
def test_no_pass_repeats_or_skips_a_sample(sampler_type, limit, history, seed):
    count, segments = history
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pass_orders, "RECORDED_ORDER_LIMIT", limit)
        patch.setattr(pass_orders, "CHUNK", 7)
        ledger = Ledger(DataOrder(sampler_type, seed, count))
        previous = None
        for world, counts in segments:
            # A segment without draws lets its neighbours meet.
            if sum(counts) and world != previous:
                ledger.run(world, counts)
                previous = world
        lacking = list(ledger.lacking)
        # Enough for what is left, on a number of processes that differs from the last.
        ledger.run(2 if previous == 1 and count > 1 else 1, [count * len(lacking) + 1])
    if previous is None or (previous == 1 and count == 1):
        return
    for number in lacking:
        assert ledger.drawn[number] == ledger.everything, f"pass {number} skips samples"


@pytest.mark.parametrize("count", [24, 23])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("sampler_type", TYPES)
def test_with_the_same_processes_the_order_is_the_samplers(sampler_type, world, count):
    """Interrupted anywhere and continued with other batches."""
    for rank in range(world):
        options = {"sample_count": count, "shuffle": True, "seed": 3, "start": rank, "step": world}
        kind = InfiniteSampler if sampler_type == "infinite" else ShardedInfiniteSampler
        expected = first(kind(**options), 130)
        order, drawn = DataOrder(sampler_type, 3, count), []
        for steps, batch in ((3, 4), (1, 1), (5, 7), (0, 9), (4, 20)):
            assert order.position == len(drawn)
            drawn += first(order.sampler(rank, world), steps * batch)
            order = DataOrder.from_state(order.advanced(world, steps * batch).state())
        assert drawn == expected[: len(drawn)]
        assert len(order.segments) == 1
        stream = order.sampler(rank, world)
        assert first(stream, 2) == first(stream, 2) == expected[128:], "iterating again starts again"


@pytest.mark.parametrize("sampler_type", TYPES)
def test_going_back_to_the_old_number_does_not_go_back_in_the_order(sampler_type):
    """Ten of 24 drawn by two processes, six by three, and the last eight by two again."""
    order, drawn = DataOrder(sampler_type, 0, 24), []
    for world, each in ((2, 5), (3, 2), (2, 4)):
        for rank in range(world):
            drawn += first(order.sampler(rank, world), each)
        order = order.advanced(world, each)
    assert sorted(drawn) == list(range(24))
    assert order.segments == (Segment(2, 5), Segment(3, 2), Segment(2, 4))


@pytest.mark.parametrize("sampler_type", TYPES)
def test_the_passes_that_follow_are_those_of_the_new_number(sampler_type):
    """Two processes have begun pass 1; what pass 1 lacks comes first, then three processes draw pass 2."""
    order = DataOrder(sampler_type, 0, 24).advanced(2, 15)
    kind = InfiniteSampler if sampler_type == "infinite" else ShardedInfiniteSampler
    for rank in range(3):
        expected = first(kind(sample_count=24, shuffle=True, start=rank, step=3), 32)
        assert first(order.sampler(rank, 3), 22)[6:] == expected[16:]


def test_what_is_left_comes_in_random_order():
    """Not sorted, and not process by process."""
    order = DataOrder("sharded_infinite", 0, 1000).advanced(4, 100)
    left = first(order.sampler(0, 1), 600)
    owner = {}
    for rank in range(4):
        stream = ShardedInfiniteSampler(sample_count=1000, shuffle=True, start=rank, step=4)
        owner |= dict.fromkeys(first(stream, 250), rank)
    assert {owner[index] for index in left[:4]} == {0, 1, 2, 3}
    assert 0.4 < np.mean(np.diff(left) > 0) < 0.6


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"seed": 1}, "train.seed was 0 and is 1"),
        ({"sampler_type": "infinite"}, "train.sampler_type was sharded_infinite and is infinite"),
        ({"sample_count": 30}, "the number of samples in the dataset was 24 and is 30"),
    ],
)
def test_another_order_begins_with_one_warning(changed, words, caplog):
    before = DataOrder("sharded_infinite", 0, 24).advanced(2, 5).advanced(1, 3)
    settings_now = {"sampler_type": "sharded_infinite", "seed": 0, "sample_count": 24} | changed
    with caplog.at_level(logging.WARNING, logger="dinov2"):
        order = DataOrder(**settings_now).continued(before.state())
    assert len(caplog.records) == 1
    assert words in caplog.text
    assert first(order.sampler(0, 1), 50) == first(DataOrder(**settings_now).sampler(0, 1), 50)
    assert order.position == 8, "the augmentation of earlier draws must not come again"
    caplog.clear()
    after = order.advanced(1, 4)
    assert DataOrder(**settings_now).continued(after.state()) == after
    assert not caplog.records


def test_the_state_loads_safely():
    order = DataOrder("infinite", 7, 24).advanced(2, 5).advanced(3, 2)
    file = io.BytesIO()
    torch.save({"data_order": order.state()}, file)
    file.seek(0)
    assert DataOrder.from_state(torch.load(file, weights_only=True)["data_order"]) == order


@pytest.mark.parametrize("state", [{}, {"seed": 0}, {"segments": [[1]]}, {"segments": 3}])
def test_a_state_that_is_none_is_refused(state):
    with pytest.raises(WeightsError, match="data_order of the checkpoint"):
        DataOrder("infinite", 0, 24).continued(state)


def test_more_processes_than_samples_are_refused():
    with pytest.raises(DatasetError, match="has 3 samples, but at least 4"):
        DataOrder("infinite", 0, 3).advanced(2, 1).sampler(0, 4)


@pytest.mark.parametrize("sampler_type", TYPES)
def test_what_is_left_of_a_large_dataset_takes_no_memory(sampler_type):
    order = (
        DataOrder(sampler_type, 0, 2**40 + 3).advanced(8, 10**9 + 1).advanced(3, 10**6).advanced(5, 10**13)
    )
    order = order.advanced(7, 12)
    tracemalloc.start()
    drawn = first(order.sampler(3, 7), 2000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(drawn)) == 2000
    assert peak < 32 * 2**20
