"""Sheets of pictures with text, drawn by PIL alone."""

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PAPER, INK, FAINT = (255, 255, 255), (30, 30, 30), (200, 200, 200)
RIGHT, WRONG = (30, 140, 60), (200, 40, 40)
TEXT_SIZE, LINE, GAP, MARGIN, BORDER = 13, 17, 8, 14, 4

# Told apart by people who do not see colours as most do: Okabe & Ito (2008), without yellow and black.
COLOURS = (
    (0, 114, 178),
    (213, 94, 0),
    (0, 158, 115),
    (204, 121, 167),
    (230, 159, 0),
    (86, 180, 233),
)


@dataclass(frozen=True)
class Cell:
    """A picture with lines of text below.

    Args:
        picture: RGB, or None for an empty place.
        lines: The text.
        border: Colour of a frame.
    """

    picture: Image.Image | None
    lines: Sequence[str] = ()
    border: tuple[int, int, int] | None = None


@cache
def font(size: int = TEXT_SIZE) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return PIL's own font."""
    return ImageFont.load_default(size)


def fitted(text: str, width: int) -> str:
    """Return the text, cut and marked with dots if it takes more than ``width`` pixels."""
    if font().getlength(text) <= width:
        return text
    while text and font().getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def colour_of(number: int) -> tuple[int, int, int]:
    """Return the colour of a class: a palette first, then hues around the circle by the golden ratio."""
    if number < len(COLOURS):
        return COLOURS[number]
    red, green, blue = colorsys.hsv_to_rgb(number * 0.618034 % 1, 0.6, 0.75)
    return round(255 * red), round(255 * green), round(255 * blue)


def sheet(
    rows: Sequence[Sequence[Cell]], side: int, title: str, row_names: Sequence[str] = ()
) -> Image.Image:
    """Draw rows of square cells.

    Args:
        rows: May differ in length.
        side: Of a picture in the sheet, in pixels.
        title: One line above all.
        row_names: A line above each row.
    """
    lines = max((len(cell.lines) for row in rows for cell in row), default=0)
    step_x, step_y = side + GAP, side + GAP + lines * LINE + (LINE + GAP if row_names else 0)
    width = 2 * MARGIN + max(len(row) for row in rows) * step_x - GAP
    height = 2 * MARGIN + LINE + GAP + len(rows) * step_y - GAP
    width = max(width, 2 * MARGIN + round(font().getlength(title)))
    page = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((MARGIN, MARGIN), title, INK, font())
    for number, row in enumerate(rows):
        top = MARGIN + LINE + GAP + number * step_y
        if row_names:
            draw.text((MARGIN, top), fitted(row_names[number], width - 2 * MARGIN), INK, font())
            top += LINE + GAP
        for column, cell in enumerate(row):
            _draw_cell(page, draw, cell, MARGIN + column * step_x, top, side)
    return page


def _draw_cell(page: Image.Image, draw: ImageDraw.ImageDraw, cell: Cell, x: int, y: int, side: int) -> None:
    if cell.picture is not None:
        inset = BORDER if cell.border else 0
        if cell.border:
            draw.rectangle((x, y, x + side - 1, y + side - 1), fill=cell.border)
        size = (side - 2 * inset, side - 2 * inset)
        page.paste(cell.picture.resize(size, Image.Resampling.BICUBIC), (x + inset, y + inset))
    for number, line in enumerate(cell.lines):
        draw.text((x, y + side + 2 + number * LINE), fitted(line, side), INK, font())


def heat(values: np.ndarray) -> np.ndarray:
    """Return colours (h, w, 3) uint8 for values (h, w) in 0..1: black, purple, orange, pale yellow."""
    stops = np.array([(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)], dtype=float)
    places = np.linspace(0, 1, len(stops))
    return np.stack([np.interp(values, places, stops[:, c]) for c in range(3)], axis=-1).astype(np.uint8)
