"""Cutting: reads the tiles of a slide once, in an order that suits the file, and writes them as pictures."""

from pathlib import Path

import numpy as np
from PIL import Image

from dinov2.data.slides.near_duplicates import find_near_duplicates, perceptual_hash
from dinov2.data.slides.plan import TilePlan, reading_order
from dinov2.data.slides.reader import Slide
from dinov2.data.slides.recipe import TilingRecipe

# Level 1 of zlib is 5 times as fast as Pillow's 6 on tissue, for files that are some percent larger.
PNG_COMPRESSION = 1


def tile_file_name(slide: str, number: int, recipe: TilingRecipe) -> str:
    """Return the file name of a tile, as the ``Pathology`` dataset expects it."""
    return f"{slide}_patch_{number}.{recipe.format}"


def save_tile(tile: Image.Image, path: Path, recipe: TilingRecipe) -> None:
    """Write one tile. JPEG keeps the full colour resolution: the usual halving blurs the edges of nuclei."""
    if recipe.format == "png":
        tile.save(path, "PNG", compress_level=PNG_COMPRESSION)
    else:
        tile.save(path, "JPEG", quality=recipe.quality, subsampling=0)


def write_tiles(slide: Slide, name: str, plan: TilePlan, recipe: TilingRecipe, folder: Path) -> np.ndarray:
    """Write the tiles of a plan into a folder, without near duplicates if the recipe says so.

    Returns:
        (n,) int64 per tile of the plan: the position of the tile it repeats, -1 for written ones.

    Raises:
        ImageReadError: a region of the slide can not be read.
    """
    folder.mkdir(parents=True)
    hashes = np.zeros(len(plan), np.uint64)
    for position in reading_order(plan, slide.level_downsamples[plan.level]):
        x, y = plan.corners[position]
        tile = slide.read(int(x), int(y), recipe.size, recipe.mpp)
        if recipe.near_duplicates is not None:
            hashes[position] = perceptual_hash(tile)
        save_tile(tile, folder / tile_file_name(name, plan.numbers[position], recipe), recipe)
    repeats = np.full(len(plan), -1, np.int64)
    if recipe.near_duplicates is not None:
        repeats = find_near_duplicates(hashes, recipe.near_duplicates)
        remove_tiles(name, plan.take(repeats >= 0), recipe, folder)
    return repeats


def remove_tiles(name: str, plan: TilePlan, recipe: TilingRecipe, folder: Path) -> None:
    """Remove the tiles of a plan from a folder."""
    for number in plan.numbers:
        (folder / tile_file_name(name, number, recipe)).unlink()
