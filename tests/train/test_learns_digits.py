"""It learns: a small ViT from scratch beats the same ViT untrained on real digits, on every seed."""

import pytest

from scripts.learn_digits import CENTERINGS, run_once


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("centering", CENTERINGS)
def test_twenty_nearest_neighbours_improve(centering, seed, tmp_path):
    result = run_once(tmp_path, centering, seed)
    assert result["gain"] >= 15, result["accuracy"]
    # Not by the iBOT term alone: the DINO term has left the value of uniform guesses.
    assert 0.3 < result["dino"][-1][1] < 0.98, result["dino"]
