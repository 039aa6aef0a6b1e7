"""Which tiles of a slide to keep, before any of them is read."""

import zlib
from dataclasses import dataclass

import numpy as np

from dinov2.data.slides.grid import tile_grid
from dinov2.data.slides.reader import LEVEL_TOLERANCE, Slide
from dinov2.data.slides.recipe import TilingRecipe
from dinov2.data.slides.tissue_mask import TissueMask

# Width, in stored pixels, of the strips in which tiles are read: three rows of 256 px blocks, of which the
# next row of tiles needs one or two again, take 19 MB of a reader's 32 MB cache.
STRIP_PIXELS = 8192


class UpsampledSlide(Slide):
    """A slide that also gives tiles finer than its pixels, by interpolation."""

    def downsample(self, mpp: float) -> float:
        """Return the level-0 pixels per pixel of a result, below 1 where it is finer than the slide."""
        wanted = mpp / self.mpp
        return wanted if wanted < 1 - LEVEL_TOLERANCE else super().downsample(mpp)


@dataclass
class TilePlan:
    """The tiles of a slide, row by row.

    Attributes:
        numbers: (n,) int64, the number of each tile among those with enough tissue, from 1.
        corners: (n, 2) int64, level-0 x and y.
        tissue: (n,) share of tissue.
        edge: (n,) bool, whether the tile reaches beyond the scanned area and is padded there.
        side: of a tile in level-0 pixels.
        level: the level of the slide that tiles are read from.
        rejected: (m, 2) corners of the grid with too little tissue.
        rejected_tissue: (m,) their share of tissue.
    """

    numbers: np.ndarray
    corners: np.ndarray
    tissue: np.ndarray
    edge: np.ndarray
    side: int
    level: int
    rejected: np.ndarray
    rejected_tissue: np.ndarray

    def __len__(self) -> int:
        return len(self.numbers)

    def take(self, chosen: np.ndarray) -> "TilePlan":
        """Return the plan with some of its tiles, by position or as a bool per tile."""
        parts = (self.numbers[chosen], self.corners[chosen], self.tissue[chosen], self.edge[chosen])
        return TilePlan(*parts, self.side, self.level, self.rejected, self.rejected_tissue)


def plan_tiles(slide: Slide, mask: TissueMask, recipe: TilingRecipe) -> TilePlan:
    """Lay the grid over a slide and keep the tiles with enough tissue.

    Raises:
        DatasetError: the slide is coarser than the tiles.
    """
    corners = tile_grid(slide, size=recipe.size, mpp=recipe.mpp, overlap=recipe.overlap, edges=recipe.edges)
    side = slide.patch_size_level0(recipe.size, recipe.mpp)
    tissue = mask.tissue_share(corners[:, 0], corners[:, 1], side)
    enough = (tissue >= recipe.min_tissue) & (tissue > 0)
    x, y, width, height = slide.bounds
    edge = (corners + side > np.array([x + width, y + height]) + 1).any(axis=1)
    kept = int(enough.sum())
    return TilePlan(
        np.arange(1, kept + 1),
        corners[enough],
        tissue[enough],
        edge[enough],
        side,
        slide.level_for(slide.downsample(recipe.mpp)),
        corners[~enough],
        tissue[~enough],
    )


def draw_tiles(plan: TilePlan, slide: str, recipe: TilingRecipe) -> TilePlan:
    """Return at most ``recipe.max_tiles`` of the tiles, drawn by the seed and the name of the slide."""
    if recipe.max_tiles is None or len(plan) <= recipe.max_tiles:
        return plan
    random = np.random.default_rng([recipe.seed, zlib.crc32(slide.encode())])
    return plan.take(np.sort(random.choice(len(plan), recipe.max_tiles, replace=False)))


def reading_order(plan: TilePlan, level_downsample: float) -> np.ndarray:
    """Return the positions of the tiles in the order to read them: strip by strip, each from top to bottom.

    Tiles rarely lie on the blocks in which a slide is stored, so neighbours share blocks. Along whole rows
    of a wide slide a reader has forgotten a block when the next row needs it; within a strip it has it still.
    """
    strip = max(plan.side, STRIP_PIXELS * level_downsample)
    x, y = plan.corners.T
    return np.lexsort((x, y, x // strip))
