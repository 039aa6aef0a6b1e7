"""Block masks against the recorded ones."""

import random

import numpy as np
import pytest

from dinov2.data import MaskingGenerator
from tests.conftest import load_golden_json

CASES = load_golden_json("data.json")["masking"]


def case_id(case):
    return f"{case['input_size']}-{case['num']}"


def generator_of(case):
    size = case["input_size"]
    return MaskingGenerator(tuple(size) if isinstance(size, list) else size, **case["kwargs"])


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_recorded_first_mask(case):
    random.seed(case["seed"])
    mask = generator_of(case)(case["num"])
    assert list(mask.shape) == case["shape"]
    assert str(mask.dtype) == case["dtype"]
    np.testing.assert_array_equal(mask, np.array(case["first_mask"], dtype=bool))


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_recorded_statistics(case):
    """Other draws than the recorded ones: agreement within the spread of as many draws."""
    random.seed(case["seed"] + 100_000)
    generator = generator_of(case)
    masks = np.stack([generator(case["num"]) for _ in range(case["draws"])])
    counts = masks.sum(axis=(1, 2))
    assert counts.mean() == pytest.approx(case["mean"], abs=0.05)
    assert counts.std() == pytest.approx(case["std"], abs=0.1)
    assert counts.max() <= case["num"]
    pairs = [masks[:, 1:] & masks[:, :-1], masks[:, :, 1:] & masks[:, :, :-1]]
    neighbour_rate = sum(pair.sum() for pair in pairs) / sum(pair.size for pair in pairs)
    assert neighbour_rate == pytest.approx(case["neighbour_rate"], rel=0.03)
    np.testing.assert_allclose(masks.mean(axis=(0, 2)), case["mean_row"], atol=0.03)
    np.testing.assert_allclose(masks.mean(axis=(0, 1)), case["mean_col"], atol=0.03)


def test_no_request_gives_no_mask_and_no_random_number():
    random.seed(0)
    state = random.getstate()
    assert not MaskingGenerator(16, max_num_patches=128)(0).any()
    assert random.getstate() == state


@pytest.mark.parametrize("maximum", [None, 24.5])
def test_repr_in_the_training_configuration(maximum):
    generator = MaskingGenerator(input_size=(7, 9), max_num_patches=maximum)
    assert "7x9" in repr(generator)
    assert str(maximum) in repr(generator)
    assert generator.get_shape() == (7, 9)


def test_request_without_any_limit():
    random.seed(1)
    assert 0 < MaskingGenerator(8)(20).sum() <= 20
