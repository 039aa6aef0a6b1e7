"""Near duplicates against comparing every pair."""

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from dinov2.data.slides.near_duplicates import find_near_duplicates, perceptual_hash
from tests.conftest import REAL_DATA


def compare_all(hashes, threshold):
    """Every tile against every kept one before it."""
    kept, repeats = [], np.full(len(hashes), -1)
    for tile, value in enumerate(hashes):
        close = [other for other in kept if (int(value) ^ int(hashes[other])).bit_count() <= threshold]
        if close:
            repeats[tile] = close[0]
        else:
            kept.append(tile)
    return repeats


@pytest.mark.parametrize("threshold", [0, 1, 3, 8, 16])
def test_equals_comparing_every_pair(threshold):
    random = np.random.default_rng(threshold)
    base = random.integers(0, 2**64, 60, dtype=np.uint64)
    hashes = base[random.integers(0, 60, 400)]
    for _ in range(threshold):  # flip up to so many bits
        hashes = hashes ^ (np.uint64(1) << random.integers(0, 64, 400).astype(np.uint64))
    repeats = find_near_duplicates(hashes, threshold)
    expected = compare_all(hashes, threshold)
    assert ((repeats >= 0) == (expected >= 0)).all()
    assert (repeats == expected).mean() > 0.99  # of several kept tiles in reach any may be named
    assert 0 < (repeats >= 0).sum() < 400


def test_none_and_one():
    assert find_near_duplicates(np.empty(0, np.uint64), 4).tolist() == []
    assert find_near_duplicates(np.array([5], np.uint64), 4).tolist() == [-1]
    assert find_near_duplicates(np.array([5, 5, 4, 2**63], np.uint64), 0).tolist() == [-1, 0, -1, -1]


def test_many_equal_tiles_stay_cheap():
    hashes = np.zeros(200_000, np.uint64)
    hashes[::2] = np.random.default_rng(0).integers(0, 2**64, 100_000, dtype=np.uint64)
    assert (find_near_duplicates(hashes, 3) >= 0).sum() == 99_999


@pytest.fixture(scope="module")
def crops():
    with Image.open(REAL_DATA / "hgsc_nest.jpg") as picture:
        return [
            picture.crop((x, y, x + 224, y + 224)) for x in range(0, 1200, 224) for y in range(0, 1200, 224)
        ]


def test_the_same_tissue_is_close_and_other_tissue_is_not(crops):
    import io

    def distance(a, b):
        return (perceptual_hash(a) ^ perceptual_hash(b)).bit_count()

    for tile in crops[:8]:
        buffer = io.BytesIO()
        tile.save(buffer, "JPEG", quality=50)
        assert distance(tile, Image.open(buffer)) <= 4
        assert distance(tile, ImageEnhance.Brightness(tile).enhance(0.9)) <= 4
    apart = [distance(a, b) for i, a in enumerate(crops) for b in crops[:i]]
    assert min(apart) > 8
    assert 28 < np.mean(apart) < 36  # unrelated hashes differ in half of the bits
