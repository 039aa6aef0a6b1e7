"""Where tiles lie: steps, edges, bounds, tissue."""

import numpy as np
import pytest

from dinov2.data.slides import open_slide, tile_grid
from dinov2.data.slides.plan import plan_tiles
from dinov2.data.slides.recipe import TilingRecipe
from dinov2.data.slides.tissue_mask import TissueMask
from dinov2.errors import ConfigError
from tests.data.slides.conftest import MPP, SVS


@pytest.fixture
def slide():
    with open_slide(str(SVS)) as slide:
        yield slide


def test_tiles_cover_the_slide_side_by_side(slide):
    corners = tile_grid(slide, size=224, mpp=MPP)
    assert corners.shape == (9 * 13, 2)
    assert corners.dtype == np.int64
    assert corners[:3].tolist() == [[0, 0], [224, 0], [448, 0]]
    assert (corners + 224 <= slide.dimensions).all()
    padded = tile_grid(slide, size=224, mpp=MPP, edges="pad")
    assert padded.shape == (10 * 14, 2)
    assert (padded.max(axis=0) < slide.dimensions).all()
    assert (padded.max(axis=0) + 224 >= slide.dimensions).all()


@pytest.mark.parametrize(
    ("factor", "size", "overlap"), [(2, 100, 0), (2.5, 64, 16), (1, 224, 112), (1, 224, -16)]
)
def test_the_step_is_that_of_the_tiles_in_level_0_pixels(slide, factor, size, overlap):
    corners = tile_grid(slide, size=size, mpp=MPP * factor, overlap=overlap)
    step = (size - overlap) * factor
    columns = np.unique(corners[:, 0])
    assert columns.tolist() == [round(step * place) for place in range(len(columns))]
    assert columns[-1] + size * factor <= 2220 < columns[-1] + step + size * factor


def test_a_slide_of_exactly_one_tile_and_one_too_small(slide):
    assert len(tile_grid(slide, size=2220, mpp=MPP)) == 1
    assert len(tile_grid(slide, size=2221, mpp=MPP)) == 0
    assert len(tile_grid(slide, size=4000, mpp=MPP, edges="pad")) == 1


def test_the_grid_starts_at_the_scanned_area(slide):
    slide.bounds = (100, 200, 450, 224)
    assert tile_grid(slide, size=224, mpp=MPP).tolist() == [[100, 200], [324, 200]]


def test_tissue_decides(slide):
    mask = np.zeros((30, 22), bool)
    mask[:, :4] = True  # the left 404 pixels
    tissue = TissueMask(mask, (2220 / 22, 2967 / 30))
    whole = tile_grid(slide, size=224, mpp=MPP, mask=tissue, min_tissue=1.0)
    assert set(whole[:, 0]) == {0}
    most = tile_grid(slide, size=224, mpp=MPP, mask=tissue, min_tissue=0.75)
    assert set(most[:, 0]) == {0, 224}
    assert set(tile_grid(slide, size=224, mpp=MPP, mask=tissue, min_tissue=0.85)[:, 0]) == {0}
    assert set(tile_grid(slide, size=224, mpp=MPP, mask=tissue)[:, 0]) == {0, 224}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size of the tiles is 0"),
        ({"mpp": 0.0}, "mpp of the tiles is 0"),
        ({"mpp": float("inf")}, "mpp of the tiles is inf"),
        ({"mpp": float("nan")}, "mpp of the tiles is nan"),
        ({"overlap": 224}, "overlap of the tiles is 224"),
        ({"min_tissue": 25}, "min_tissue is 25"),
        ({"edges": "crop"}, 'edges of the grid are "crop"; accepted are drop and pad'),
    ],
)
def test_values_out_of_range(slide, options, message):
    with pytest.raises(ConfigError, match=message):
        tile_grid(slide, **{"size": 224, "mpp": MPP, **options})


def test_a_slide_full_of_tissue_keeps_every_tile_at_a_limit_of_1(slide):
    mask = np.ones((91, 68), bool)
    tissue = TissueMask(mask, (2220 / 68, 2967 / 91), MPP)
    corners = tile_grid(slide, size=64, mpp=MPP)
    assert tissue.tissue_share(*corners.T, 64).tolist() == [1.0] * len(corners)
    assert len(tile_grid(slide, size=64, mpp=MPP, mask=tissue, min_tissue=1.0)) == len(corners)
    assert len(plan_tiles(slide, tissue, TilingRecipe(mpp=MPP, size=64, min_tissue=1.0))) == len(corners)
