"""Index streams: recorded orders, resuming, shares of several processes."""

import itertools
import logging
import tracemalloc

import numpy as np
import pytest
import torch

from dinov2.data import pass_orders, samplers
from dinov2.data.samplers import EpochSampler, InfiniteSampler, ShardedInfiniteSampler
from dinov2.errors import DatasetError
from tests.conftest import load_golden_json

RUNS = load_golden_json("samplers.json")["runs"]


def first(sampler, count):
    return list(itertools.islice(sampler, count))


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run['cls']}-{list(run['kwargs'].values())}")
def test_recorded_order(run):
    sampler = getattr(samplers, run["cls"])(**run["kwargs"])
    if "set_epoch" in run:
        sampler.set_epoch(run["set_epoch"])
        assert len(sampler) == run["length"]
    assert first(sampler, len(run["indices"])) == run["indices"]


def test_orders_written_in_the_specification():
    assert first(InfiniteSampler(sample_count=10, shuffle=True, start=0, step=1), 20) == [
        *(4, 1, 7, 5, 3, 9, 0, 8, 6, 2),
        *(1, 3, 6, 8, 0, 2, 5, 7, 4, 9),
    ]
    assert first(InfiniteSampler(sample_count=10, shuffle=True, start=1, step=2), 10) == [
        *(1, 5, 9, 8, 2),
        *(3, 8, 2, 7, 9),
    ]

    def sharded(rank, count, new):
        sampler = ShardedInfiniteSampler(
            sample_count=10, shuffle=True, start=rank, step=2, use_new_shuffle_tensor_slice=new
        )
        return first(sampler, count)

    assert sharded(0, 15, new=False) == [6, 0, 7, 4, 3, 4, 0, 7, 6, 3, 6, 0, 7, 3, 4]
    assert sharded(1, 15, new=False) == [8, 5, 9, 2, 1, 9, 2, 5, 1, 8, 2, 5, 9, 1, 8]
    assert sharded(0, 10, new=True) == [6, 4, 7, 0, 3, 4, 3, 6, 0, 7]
    assert sharded(1, 10, new=True) == [1, 2, 9, 8, 5, 9, 2, 8, 5, 1]


def draw_one_by_one(share, seed):
    """The same shuffle in torch's scalar draws, as the orders were recorded."""
    generator = torch.Generator().manual_seed(seed)
    result = list(share)
    for i in range(1, len(share)):
        j = int(torch.randint(0, i + 1, (1,), generator=generator))
        result[i] = result[j]
        result[j] = share[i]
    return result


@pytest.mark.parametrize("seed", [0, 3, 2**31 + 11, (300 << 24) + 5])
def test_vectorised_draws_equal_scalar_draws(seed, monkeypatch):
    monkeypatch.setattr(pass_orders, "CHUNK", 999)
    share = np.arange(100, 3100, dtype=np.int32)
    assert pass_orders.shuffle_inside_out(share, seed).tolist() == draw_one_by_one(share.tolist(), seed)


@pytest.fixture(params=[pass_orders.RECORDED_ORDER_LIMIT, 0], ids=["recorded", "computed"])
def limit(request, monkeypatch):
    """Every dataset is small, or every one counts as large."""
    monkeypatch.setattr(pass_orders, "RECORDED_ORDER_LIMIT", request.param)
    monkeypatch.setattr(pass_orders, "CHUNK", 7)
    return request.param


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize(
    ("sampler_class", "options"),
    [
        (InfiniteSampler, {}),
        (ShardedInfiniteSampler, {"advance_per_rank": True}),
        (ShardedInfiniteSampler, {"advance_per_rank": True, "use_new_shuffle_tensor_slice": True}),
        (ShardedInfiniteSampler, {"advance_per_rank": True, "reshuffle_globally": True}),
    ],
)
def test_resume_continues_the_uninterrupted_stream(sampler_class, options, world, shuffle, limit):
    for rank in range(world):
        arguments = {
            "sample_count": 20,
            "shuffle": shuffle,
            "seed": 5,
            "start": rank,
            "step": world,
        } | options
        whole = first(sampler_class(**arguments), 150)
        for drawn in (0, 1, 6, 7, 19, 20, 21, 64, 100):
            resumed = sampler_class(**arguments, advance=drawn)
            assert first(resumed, 50) == whole[drawn : drawn + 50]
            assert first(resumed, 50) == whole[drawn : drawn + 50], "iterating again starts again"


def test_a_long_advance_does_not_walk_through_the_samples():
    """One by one, the first two would take days."""
    far = 10**12 + 3
    jumped = ShardedInfiniteSampler(sample_count=1000, shuffle=True, start=0, step=1, advance=far)
    assert len(set(first(jumped, 900))) == 900
    assert first(InfiniteSampler(sample_count=1000, start=0, step=1, advance=far), 3) == [3, 4, 5]
    resumed = InfiniteSampler(sample_count=100_000, shuffle=True, start=0, step=1, advance=200 * 100_000 + 7)
    assert len(set(first(resumed, 1000))) == 1000


@pytest.mark.parametrize("world", [1, 4])
def test_upstreams_unit_of_advance(world, limit):
    """So many passes of the process and then so many of its indices."""
    options = {"sample_count": 20, "shuffle": True, "start": world - 1, "step": world}
    whole = first(ShardedInfiniteSampler(**options), 200)
    for advance in (3, 20, 33, 47):
        begin = advance // 20 * (20 // world) + advance % 20
        assert first(ShardedInfiniteSampler(**options, advance=advance), 50) == whole[begin : begin + 50]


def test_shares_are_disjoint_and_complete(limit):
    ranks = [
        first(ShardedInfiniteSampler(sample_count=23, shuffle=True, start=rank, step=4), 5)
        for rank in range(4)
    ]
    assert len({index for share in ranks for index in share}) == 20


def test_global_reshuffle_reaches_every_sample_from_every_process(caplog, limit):
    with caplog.at_level(logging.WARNING, logger="dinov2"):
        sampler = ShardedInfiniteSampler(
            sample_count=23, shuffle=True, start=1, step=4, reshuffle_globally=True
        )
    assert not caplog.records
    assert set(first(sampler, 400)) == set(range(23))
    peers = [
        first(
            ShardedInfiniteSampler(
                sample_count=23, shuffle=True, start=rank, step=4, reshuffle_globally=True, advance=5,
                advance_per_rank=True,
            ),
            5,
        )
        for rank in range(4)
    ]  # fmt: skip
    assert len({index for share in peers for index in share}) == 20


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("sampler_class", [InfiniteSampler, ShardedInfiniteSampler])
def test_computed_orders_are_passes_like_the_recorded_ones(sampler_class, shuffle, limit):
    """Every pass has every sample once, in another order; another seed has other ones."""
    by_seed = []
    for seed in (0, 1):
        shares = [
            sampler_class(sample_count=50, shuffle=shuffle, seed=seed, start=rank, step=2) for rank in (0, 1)
        ]
        streams = [first(share, 75) for share in shares]
        passes = [[s for stream in streams for s in stream[25 * n : 25 * n + 25]] for n in range(3)]
        assert [sorted(number) for number in passes] == [list(range(50))] * 3
        assert (len(set(map(tuple, passes))) == 3) is shuffle
        by_seed.append(passes)
    assert (by_seed[0] != by_seed[1]) is shuffle


HUGE = 128_000_000
LARGE_SAMPLERS = [
    (EpochSampler, {"size": HUGE, "sample_count": HUGE}),
    (EpochSampler, {"size": 10 * HUGE + 1, "sample_count": HUGE}),
    (InfiniteSampler, {"sample_count": HUGE}),
    (InfiniteSampler, {"sample_count": HUGE, "advance": 10**15}),
    (ShardedInfiniteSampler, {"sample_count": HUGE, "advance": 10**15}),
    (ShardedInfiniteSampler, {"sample_count": HUGE, "advance": 10**15, "advance_per_rank": True}),
    (ShardedInfiniteSampler, {"sample_count": HUGE, "reshuffle_globally": True}),
    (ShardedInfiniteSampler, {"sample_count": 2**62, "advance": 2**62 + 5}),
]


def allocated(function):
    """Peak of what ``function`` allocates in numpy and in Python, in bytes, and its result."""
    tracemalloc.start()
    result = function()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak, result


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("sampler_class", "options"), LARGE_SAMPLERS)
def test_above_the_limit_memory_does_not_grow_with_the_dataset(sampler_class, options, shuffle, monkeypatch):
    for name in ("randperm", "arange", "empty"):
        monkeypatch.delattr(torch, name)  # would allocate where tracemalloc does not look
    sampler = sampler_class(**options, shuffle=shuffle, start=3, step=8)
    peak, drawn = allocated(lambda: first(sampler, 20_000))
    assert peak < 32 * 2**20  # 4 bytes per sample would be 488 MiB
    assert max(drawn) < options["sample_count"]
    assert len(set(drawn)) == len(drawn)


def test_the_limit_is_above_the_datasets_of_upstream():
    """ImageNet-22k has 14.2 million samples; one sample above the limit is computed, the limit itself not."""
    assert 14_200_000 < pass_orders.RECORDED_ORDER_LIMIT == samplers.RECORDED_ORDER_LIMIT == 2**24
    assert pass_orders.has_recorded_order(2**24)
    assert not pass_orders.has_recorded_order(2**24 + 1)


@pytest.mark.parametrize("size", [9, 30, 64])
def test_computed_epochs_repeat_every_sample_equally_often_up_to_one(size, monkeypatch):
    monkeypatch.setattr(pass_orders, "RECORDED_ORDER_LIMIT", 0)

    def epoch(number, **options):
        drawn = []
        for rank in range(3):
            sampler = EpochSampler(size=size, sample_count=20, shuffle=True, start=rank, step=3, **options)
            sampler.set_epoch(number)
            drawn.append(list(sampler))
            assert len(drawn[-1]) == len(sampler)
        return [index for share in drawn for index in share]

    counts = np.bincount(epoch(0), minlength=20)
    assert counts.sum() == size
    assert counts.max() - counts.min() <= 1
    assert epoch(0) != epoch(1)
    assert epoch(0) != epoch(0, seed=1)
    assert epoch(1) == epoch(1)


def test_samples_left_out_are_announced(caplog):
    with caplog.at_level(logging.WARNING, logger="dinov2"):
        sampler = ShardedInfiniteSampler(sample_count=23, shuffle=True, start=0, step=4)
    assert "the 23 samples do not divide evenly between 4 processes" in caplog.text
    assert len(set(first(sampler, 100))) == 5


def test_epoch_seed_mixing():
    def order(seed, epoch, mix):
        sampler = EpochSampler(
            size=30, sample_count=30, shuffle=True, seed=seed, start=0, step=1, mix_seed=mix
        )
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(1, 0, mix=False) == order(2, 0, mix=False)
    assert order(1, 0, mix=True) != order(2, 0, mix=True)
    assert order(1, 0, mix=True) != order(1, 1, mix=True)
    assert order(0, 3, mix=True) == order(0, 3, mix=False)


@pytest.mark.parametrize("sampler_class", [InfiniteSampler, ShardedInfiniteSampler])
@pytest.mark.parametrize("count", [0, 3])
def test_fewer_samples_than_processes(sampler_class, count):
    with pytest.raises(DatasetError, match=f"has {count} samples, but at least 4"):
        sampler_class(sample_count=count, shuffle=True, start=0, step=4)
