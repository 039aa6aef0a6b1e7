"""The permutation without memory: exact where it must be, judged beside a true shuffle elsewhere."""

import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dinov2.data import permutation
from dinov2.data.permutation import MAX_SIZE, TABLE_LIMIT, Permutation

# Fixed keys make every verdict below the same on each run: these are not tests that fail now and then.
UNLIKELY = 1e-4
LARGE = 128_000_000
TEN = [2, 7, 6, 5, 0, 8, 9, 3, 1, 4]
FOUR_OF_LARGE = [31558356, 14742608, 115408335, 102801189]


def shuffle(size, *key):
    """The true shuffle that the permutation is judged beside."""
    return np.random.default_rng(key).permutation(size)


def permuted(size, *key):
    return Permutation(size, *key)(np.arange(size))


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 20_000), st.integers(0, 2**64 - 1), st.booleans())
def test_every_number_has_one_place(size, key, with_table):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(permutation, "TABLE_LIMIT", TABLE_LIMIT if with_table else 0)
        order = permuted(size, key)
    assert np.array_equal(np.sort(order), np.arange(size))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, MAX_SIZE), st.integers(0, 99), st.data())
def test_any_size_and_any_place(size, key, data):
    """Different places of the largest sizes, too, get different numbers of the range."""
    places = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=40, unique=True))
    numbers = Permutation(size, key)(np.array(places, dtype=np.int64))
    assert numbers.dtype == np.int64
    assert len(set(numbers.tolist())) == len(places)
    assert numbers.min() >= 0 and numbers.max() < size
    one_by_one = [int(Permutation(size, key)(np.array([place]))[0]) for place in places[:3]]
    assert one_by_one == numbers[:3].tolist()


def test_the_order_is_fixed_for_good():
    """A resumed run relies on it, also with another version of numpy."""
    assert permuted(10, 0, 1).tolist() == TEN
    assert Permutation(LARGE, 0, 1)(np.array([0, 1, 2, LARGE - 1])).tolist() == FOUR_OF_LARGE


def test_key_parts_do_not_run_into_each_other():
    keys = [(1, 0), (0, 1), (2**32, 0), (0, 2**32), (1, 1), (2**63, 5), (2**63 + 2**40, 5)]
    orders = [tuple(permuted(100, *key)) for key in keys]
    assert len(set(orders)) == len(keys)


def test_memory_and_time_do_not_grow_with_the_size():
    places = np.arange(1000, dtype=np.int64) + 2**40
    tracemalloc.start()
    Permutation(2**62, 7)(places)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**18


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_all_orders_of_few_numbers_are_equally_likely(size):
    counts = dict.fromkeys(itertools.permutations(range(size)), 0)
    for key in range(60 * len(counts)):
        counts[tuple(permuted(size, key).tolist())] += 1
    assert stats.chisquare(list(counts.values())).pvalue > UNLIKELY


def evenness(values, cells):
    """p-value of the hypothesis that ``values`` fall into ``range(cells)`` evenly."""
    return stats.chisquare(np.bincount(values, minlength=cells)).pvalue


def coarse(numbers, size, cells):
    return numbers * cells // size


@pytest.mark.parametrize("make", [permuted, shuffle], ids=["permutation", "true shuffle"])
@pytest.mark.parametrize("size", [1000, 5000])
def test_over_many_keys_every_number_is_anywhere(make, size):
    """First and last place, two neighbours, and places that a round of the network sees as neighbours."""
    orders = np.stack([make(size, 5, key) for key in range(2000)])
    side = 71  # of the rectangle for 5000
    for place in (0, 1, size // 2, size - 1):
        assert evenness(coarse(orders[:, place], size, 50), 50) > UNLIKELY
    for first, second in ((0, 1), (0, side), (0, side - 1), (17, size - 3)):
        pair = coarse(orders[:, first], size, 10) * 10 + coarse(orders[:, second], size, 10)
        assert evenness(pair, 100) > UNLIKELY
        assert (
            evenness(coarse((orders[:, second] - orders[:, first]) % size - 1, size - 1, 50), 50) > UNLIKELY
        )
    where = np.argsort(orders, axis=1)
    assert evenness(coarse(where[:, 3], size, 50), 50) > UNLIKELY
    fixed_points = (orders == np.arange(size)).sum(axis=1)
    expected = stats.poisson.pmf(range(4), 1) * len(orders)
    seen = np.bincount(np.minimum(fixed_points, 4), minlength=5)
    assert stats.chisquare(seen, [*expected, len(orders) - expected.sum()]).pvalue > UNLIKELY


@pytest.mark.parametrize("size", [LARGE, 2**24 + 1, 2**40 + 7])
def test_within_one_large_order(size):
    """A window of it is even, neighbours do not follow each other, two keys have nothing in common."""
    side = int(Permutation(size, 1)._right)
    places = np.arange(200_000, dtype=np.int64) + size // 3
    order, other = Permutation(size, 1)(places), Permutation(size, 2)(places)
    assert evenness(coarse(order, size, 1000), 1000) > UNLIKELY
    assert evenness(order % 1000, 1000) > UNLIKELY
    for lag in (1, 2, side):
        later = Permutation(size, 1)(places + lag)
        assert abs(stats.pearsonr(order, later).statistic) < 0.012
        assert evenness(coarse(order, size, 30) * 30 + coarse(later, size, 30), 900) > UNLIKELY
        assert evenness(coarse((later - order) % size, size, 1000), 1000) > UNLIKELY
        # The halves that the network works on, which bins of the whole number would hide.
        assert evenness(coarse(order % side, side, 30) * 30 + coarse(later % side, side, 30), 900) > UNLIKELY
    assert evenness(coarse(order, size, 30) * 30 + coarse(other, size, 30), 900) > UNLIKELY
    assert evenness(coarse((other - order) % size, size, 1000), 1000) > UNLIKELY
