"""The page of a slide: which examples it shows, how it marks the tiles, and what its heading says."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from dinov2.data.slides.contact_sheet import (
    COLUMNS,
    REJECTED_ROWS,
    TILE,
    Samples,
    choose_rejected,
    draw_overview,
)
from dinov2.data.slides.plan import TilePlan
from dinov2.data.slides.recipe import TilingRecipe
from dinov2.data.slides.tiling import _heading
from dinov2.data.slides.tissue_mask import TissueMask

SIDE = 100
NO_SAMPLES = Samples(np.empty((0, 2), int), [])


def plan_of(kept=(), rejected=(), rejected_tissue=()):
    corners = np.array(kept, int).reshape(-1, 2)
    count = len(corners)
    return TilePlan(
        np.arange(1, count + 1), corners, np.ones(count), np.zeros(count, bool), SIDE, 0,
        np.array(rejected, int).reshape(-1, 2), np.array(rejected_tissue, float),
    )  # fmt: skip


def test_left_out_examples_are_those_that_just_missed():
    shares = np.linspace(0, 0.48, 25)[np.random.default_rng(0).permutation(25)]
    plan = plan_of(rejected=[(SIDE * number, 0) for number in range(25)], rejected_tissue=shares)
    mask = TissueMask(np.zeros((1, 25), bool), (SIDE, SIDE))
    shown = choose_rejected(plan, mask, NO_SAMPLES, min_tissue=0.5)
    nearest = np.argsort(-shares)[: COLUMNS * REJECTED_ROWS]
    assert (shown.corners[:, 0] // SIDE).tolist() == nearest.tolist()
    assert shown.captions[0] == "tissue 48% < 50%"


def test_ink_goes_before_what_just_missed():
    pen = np.zeros((1, 25), bool)
    pen[0, 20] = True
    plan = plan_of(
        rejected=[(SIDE * number, 0) for number in range(25)], rejected_tissue=[0.4] * 20 + [0] * 5
    )
    mask = TissueMask(np.zeros((1, 25), bool), (SIDE, SIDE), pen=pen)
    shown = choose_rejected(plan, mask, NO_SAMPLES, min_tissue=0.5)
    assert shown.corners[0].tolist() == [20 * SIDE, 0]
    assert shown.captions[0] == "tissue 0%, ink/dust 100%"


@pytest.mark.parametrize("fill", [True, False])
def test_tiles_that_overlap_are_outlined_only(fill):
    overview = Image.new("RGB", (1000, 1000), "white")
    mask = TissueMask(np.zeros((10, 10), bool), (SIDE, SIDE))
    slide = SimpleNamespace(dimensions=(1000, 1000))
    picture = np.asarray(draw_overview(overview, slide, mask, plan_of([(200, 300)]), fill=fill))
    assert picture[300, 250].tolist() == list(TILE)
    assert (picture[350, 250].tolist() == [255, 255, 255]) is not fill
    assert picture[450, 250].tolist() == [255, 255, 255]


def test_the_heading_says_what_was_dropped_and_keeps_the_letters_of_names():
    facts = {
        "dimensions": (1000, 900), "slide_mpp": 0.25, "mpp_source": "file", "backend": "openslide",
        "saturation_threshold": 0.1, "tissue_source": "otsu", "tissue_mm2": 1.5, "n_grid": 90, "n_tissue": 50,
        "n_near_duplicates": 7, "n_tiles": 30,
    }  # fmt: skip
    name, _, counts = _heading("M\u00fcller \u4e2d", facts, TilingRecipe(max_tiles=30, min_tissue=0.5))
    assert name == "Muller \\u4e2d"
    assert counts.startswith("30 tiles of 224 px")
    assert counts.endswith("50 of 90 places hold 50% tissue; 7 near duplicates; 13 dropped by --max-tiles")
