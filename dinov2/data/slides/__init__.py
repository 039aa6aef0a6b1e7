"""Whole-slide images: reading at a wanted resolution, grids of tiles, tissue."""

from dinov2.data.slides.grid import tile_grid
from dinov2.data.slides.reader import Slide, open_slide

__all__ = ["Slide", "open_slide", "tile_grid"]
