"""Index streams: recorded orders, resuming, shares of several processes."""

import itertools
import logging

import numpy as np
import pytest
import torch

from dinov2.data import samplers
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
    monkeypatch.setattr(samplers, "CHUNK", 999)
    share = np.arange(100, 3100, dtype=np.int32)
    assert samplers._shuffle_inside_out(share, seed).tolist() == draw_one_by_one(share.tolist(), seed)


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
def test_resume_continues_the_uninterrupted_stream(sampler_class, options, world, shuffle):
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


def test_shares_are_disjoint_and_complete():
    ranks = [
        first(ShardedInfiniteSampler(sample_count=23, shuffle=True, start=rank, step=4), 5)
        for rank in range(4)
    ]
    assert len({index for share in ranks for index in share}) == 20


def test_global_reshuffle_reaches_every_sample_from_every_process(caplog):
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


def test_samples_left_out_are_announced(caplog):
    with caplog.at_level(logging.WARNING, logger="dinov2"):
        sampler = ShardedInfiniteSampler(sample_count=23, shuffle=True, start=0, step=4)
    assert "3 of 23 samples" in caplog.text
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
