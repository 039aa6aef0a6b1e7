"""The sheet of crops comes out of the trainer's own pipeline."""

import numpy as np
import pytest

from dinov2.configs import resolve_config
from scripts.quickstart.crops import GAP, HEADING, LARGE, MASK_COLOUR, SMALL, draw_sheet
from scripts.quickstart.training import CONFIG_FILE


@pytest.fixture(scope="module")
def cfg(tiles):
    overrides = ["crops.local_crops_number=6", "ibot.mask_sample_probability=1.0"]
    return resolve_config(str(CONFIG_FILE), [f"train.dataset_path={tiles.dataset_string}", *overrides])


def test_sheet_has_tiles_crops_and_masks(cfg):
    sheet = np.asarray(draw_sheet(cfg, num_tiles=2), int)
    assert sheet.shape == (HEADING + 2 * (LARGE + GAP) + GAP, 3 * (LARGE + GAP) + 3 * (SMALL + GAP) + GAP, 3)
    # A masked pixel is four fifths yellow; tissue has no blue that low beside so much red and green.
    masked = (sheet[..., 2] < 60) & (sheet[..., 0] > 200) & (sheet[..., 1] > 150)
    tile, first, second = (masked[HEADING:, GAP + c * (LARGE + GAP) :][:, :LARGE] for c in range(3))
    assert tile.mean() < 0.01
    assert first.mean() > 0.05
    assert second.mean() > 0.05
    assert tuple(MASK_COLOUR) == (255, 196, 0)


def test_one_seed_one_sheet(cfg):
    first, again, other = (np.asarray(draw_sheet(cfg, num_tiles=1, seed=seed)) for seed in (3, 3, 4))
    assert (first == again).all()
    assert (first != other).any()


def test_without_local_crops(cfg):
    cfg = cfg.copy()
    cfg.crops.local_crops_number = 0
    assert draw_sheet(cfg, num_tiles=1).width == GAP + 3 * (LARGE + GAP)
