"""A page per slide to judge its tiles by eye: what was found, removed, kept and left out."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dinov2.data.slides.plan import TilePlan
from dinov2.data.slides.reader import Slide
from dinov2.data.slides.recipe import TilingRecipe
from dinov2.data.slides.tissue_mask import TissueMask

OVERVIEW = 1000  # pixels, longer side
SAMPLE, COLUMNS, KEPT_ROWS, REJECTED_ROWS = 144, 4, 3, 2
GAP, LINE, TEXT = 12, 18, 13
LITTLE = 0.02  # a share of ink or dust not worth a mention
TISSUE, PEN, ARTEFACT, TILE = (0, 150, 60), (230, 0, 200), (255, 130, 0), (30, 90, 220)
_INK, _PAPER = (20, 20, 20), (255, 255, 255)


@dataclass
class Samples:
    """Tiles to show: their corners, level-0 x and y, and a line of text for each."""

    corners: np.ndarray
    captions: list[str]


def draw_sheet(
    slide: Slide,
    overview: Image.Image,
    mask: TissueMask,
    kept: TilePlan,
    rejected: Samples,
    recipe: TilingRecipe,
    lines: list[str],
) -> Image.Image:
    """Return the page.

    Args:
        slide: read for the samples.
        overview: the whole slide.
        mask: its outline is drawn, and what was removed from it is coloured.
        kept: outlined in the overview; some are shown.
        rejected: shown below the kept ones.
        recipe: how tiles look.
        lines: heading, a line of text each.
    """
    picture = draw_overview(overview, slide, mask, kept, fill=recipe.overlap <= 0)
    top = GAP + len(lines) * LINE + LINE + GAP
    column = GAP + picture.width + GAP
    rows = (LINE + KEPT_ROWS * (SAMPLE + LINE)) + GAP + (LINE + REJECTED_ROWS * (SAMPLE + LINE))
    size = (column + COLUMNS * (SAMPLE + GAP), top + max(picture.height, rows) + GAP)
    page = Image.new("RGB", (max(size[0], 900), size[1]), _PAPER)
    draw = ImageDraw.Draw(page)
    for number, line in enumerate(lines):
        draw.text((GAP, GAP + number * LINE), line, _INK, _font())
    _draw_legend(draw, GAP + len(lines) * LINE)
    page.paste(picture, (GAP, top))
    shown = _spread(kept)
    bottom = _draw_samples(
        page, (column, top), f"kept, {len(shown.corners)} of {len(kept)}", shown, slide, recipe
    )
    title = f"left out, {len(rejected.corners)} examples"
    _draw_samples(page, (column, bottom + GAP), title, rejected, slide, recipe)
    return page


def draw_overview(
    overview: Image.Image, slide: Slide, mask: TissueMask, kept: TilePlan, *, fill: bool = True
) -> Image.Image:
    """Return the slide with the outline of its tissue, removed pixels in colour, and the kept tiles."""
    scale = OVERVIEW / max(overview.size)
    size = tuple(max(1, round(side * scale)) for side in overview.size)
    pixels = np.asarray(
        overview.resize(size, Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC)
    )
    pixels = pixels.astype(np.float32)
    for removed, colour in ((mask.pen, PEN), (mask.artefact, ARTEFACT)):
        if removed is not None:
            where = _resized(removed, size)
            pixels[where] = 0.4 * pixels[where] + 0.6 * np.array(colour, np.float32)
    picture = Image.fromarray(pixels.round().astype(np.uint8))
    _draw_grid(picture, kept, slide, fill=fill)
    pixels = np.array(picture)
    pixels[_outline(_resized(mask.mask, size))] = TISSUE
    return Image.fromarray(pixels)


def choose_rejected(plan: TilePlan, mask: TissueMask, repeated: Samples, *, min_tissue: float) -> Samples:
    """Choose the left-out tiles to show: repeats, tiles with ink or dust, near misses, and plain others.

    Args:
        plan: its rejected corners are chosen from.
        mask: says where ink and dust were removed.
        repeated: near duplicates with their captions.
        min_tissue: what the tiles lack.
    """
    room = COLUMNS * REJECTED_ROWS
    removed = _removed_share(plan, mask)
    order = _rejected_order(plan, removed)
    repeats = min(len(repeated.corners), room // 2 if len(order) else room)
    order = order[: room - repeats]
    captions = [
        f"tissue {plan.rejected_tissue[tile]:.0%}, ink/dust {removed[tile]:.0%}"
        if removed[tile] > LITTLE
        else f"tissue {plan.rejected_tissue[tile]:.0%} < {min_tissue:.0%}"
        if min_tissue
        else "no tissue"
        for tile in order
    ]
    corners = np.concatenate([repeated.corners[:repeats], plan.rejected[order]]).reshape(-1, 2)
    return Samples(corners, repeated.captions[:repeats] + captions)


def _removed_share(plan: TilePlan, mask: TissueMask) -> np.ndarray:
    """Share of each rejected tile that was removed from the mask as ink or dust."""
    x, y = plan.rejected.T
    removed = np.zeros(len(x))
    for part in (mask.pen, mask.artefact):
        if part is not None:
            removed += TissueMask(part, mask.downsample).tissue_share(x, y, plan.side)
    return removed


def _rejected_order(plan: TilePlan, removed: np.ndarray) -> np.ndarray:
    stained = np.argsort(-removed, kind="stable")[: min(3, int((removed > LITTLE).sum()))]
    near = np.argsort(-plan.rejected_tissue, kind="stable")[: COLUMNS * REJECTED_ROWS]  # glass comes last
    return np.array(list(dict.fromkeys([*stained, *near])), int)


def _spread(kept: TilePlan) -> Samples:
    """Tiles spread evenly over the slide, row by row."""
    count = min(len(kept), COLUMNS * KEPT_ROWS)
    chosen = kept.take(np.linspace(0, len(kept) - 1, count).astype(int)) if count else kept
    captions = [
        f"{number}: {share:.0%}{', padded' if edge else ''}"
        for number, share, edge in zip(chosen.numbers, chosen.tissue, chosen.edge, strict=True)
    ]
    return Samples(chosen.corners, captions)


def _draw_samples(
    page: Image.Image,
    place: tuple[int, int],
    title: str,
    samples: Samples,
    slide: Slide,
    recipe: TilingRecipe,
) -> int:
    """Draw tiles with captions below a title; return the row below them."""
    draw = ImageDraw.Draw(page)
    left, top = place
    draw.text((left, top), title, _INK, _font())
    for row, column, corner, caption in _cells(samples):
        x, y = left + column * (SAMPLE + GAP), top + LINE + row * (SAMPLE + LINE)
        tile = slide.read(int(corner[0]), int(corner[1]), recipe.size, recipe.mpp)
        page.paste(tile.resize((SAMPLE, SAMPLE), Image.Resampling.BOX), (x, y))
        draw.rectangle((x, y, x + SAMPLE - 1, y + SAMPLE - 1), outline=(160, 160, 160))
        draw.text((x, y + SAMPLE), caption, _INK, _font())
    rows = -(-len(samples.corners) // COLUMNS)
    return top + LINE + rows * (SAMPLE + LINE)


def _cells(samples: Samples) -> Iterator[tuple[int, int, np.ndarray, str]]:
    for number, (corner, caption) in enumerate(zip(samples.corners, samples.captions, strict=True)):
        yield number // COLUMNS, number % COLUMNS, corner, caption


def _draw_legend(draw: ImageDraw.ImageDraw, y: int) -> None:
    x = GAP
    for text, colour in (
        ("outline of the tissue", TISSUE),
        ("kept tiles", TILE),
        ("removed: marker ink", PEN),
        ("removed: dust, edges, threads", ARTEFACT),
    ):
        draw.rectangle((x, y + 3, x + 12, y + 13), fill=colour)
        draw.text((x + 18, y), text, _INK, _font())
        x += 18 + int(draw.textlength(text, _font())) + 2 * GAP


def _draw_grid(picture: Image.Image, kept: TilePlan, slide: Slide, *, fill: bool) -> None:
    shade = (*TILE, 28) if fill else None  # where tiles overlap it would be painted twice
    draw = ImageDraw.Draw(picture, "RGBA")
    scale = np.array(picture.size) / np.array(slide.dimensions)
    for corner in kept.corners:
        left, top = corner * scale
        right, bottom = (corner + kept.side) * scale
        # Squares of a few pixels would be all outline.
        outline = (*TILE, 255) if right - left >= 8 else (*TILE, 90)
        draw.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), shade, outline)


def _outline(mask: np.ndarray) -> np.ndarray:
    """Pixels of a mask that have a neighbour outside it, two pixels thick."""
    padded = np.pad(mask, 2, mode="edge")
    height, width = mask.shape
    inner = mask.copy()
    for down, right in ((0, 2), (4, 2), (2, 0), (2, 4)):
        inner &= padded[down : down + height, right : right + width]
    return mask & ~inner


def _resized(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))


def _font() -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(TEXT)
