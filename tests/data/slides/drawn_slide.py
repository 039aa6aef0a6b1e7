"""A slide whose tissue is known to the pixel: real H&E in drawn outlines, with ink, dust and glass edges.

At 0.5 um per pixel: two pieces of tissue cut out of the carcinoma picture, one with a hole that is glass and
a lumen that is not; strokes of green, blue, black and red ink, one of them across tissue.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from tests.conftest import REAL_DATA

MPP = 0.5
WIDTH, HEIGHT = 4480, 3360
GREEN, BLUE, BLACK, RED = (20, 110, 70), (35, 60, 170), (25, 22, 28), (200, 30, 45)
STROKES = (
    (GREEN, [(2310, 210), (2730, 630), (3290, 350), (3710, 700)]),
    (BLUE, [(2310, 910), (2940, 1190), (3640, 1050)]),
    (BLACK, [(280, 2310), (910, 2870), (630, 3150)]),
    (RED, [(1610, 2450), (1960, 3010), (1820, 3220)]),
    (GREEN, [(3010, 2100), (3220, 2730)]),
)
PEN_PIXELS = 210


@dataclass(frozen=True)
class DrawnSlide:
    """A picture (H, W, 3) uint8 and what is what in it, (H, W) bool."""

    picture: np.ndarray
    tissue: np.ndarray
    pen: np.ndarray


@cache
def draw_slide() -> DrawnSlide:
    random = np.random.default_rng(0)
    noise = np.tile(random.normal(0, 2, (HEIGHT // 8, WIDTH // 8, 1)), (8, 8, 1)).round().astype(np.int16)
    picture = Image.fromarray((np.array([243, 241, 245], np.int16) + noise).astype(np.uint8))
    hole, lumen = _blob(1190, 1050, 266, seed=2), _blob(1470, 1610, 42, seed=3)
    tissue = (_blob(1190, 1190, 805, seed=1) & ~hole) | _blob(3010, 2450, 630, seed=4)
    picture.paste(_mosaic(), (0, 0), Image.fromarray(tissue & ~lumen))
    pen = np.zeros_like(tissue)
    for colour, points in STROKES:
        pen |= _ink(picture, colour, points)
    _dirt(picture, random)
    return DrawnSlide(np.asarray(picture), tissue & ~pen, pen)


def write_pyramid(path: Path, picture: np.ndarray, *, mpp: float = MPP, factors=(1, 4)) -> Path:
    """Write a tiled, pyramidal TIFF of JPEG blocks as slide scanners do."""
    import tifffile

    with tifffile.TiffWriter(path) as file:
        for factor in factors:
            level = np.asarray(Image.fromarray(picture).reduce(factor)) if factor > 1 else picture
            file.write(
                level,
                tile=(256, 256),
                photometric="rgb",
                compression="jpeg",
                compressionargs={"level": 92},
                resolution=(1e4 / mpp / factor, 1e4 / mpp / factor),
                resolutionunit="CENTIMETER",
                subfiletype=int(factor > 1),
                metadata=None,
            )
    return path


def real_slide_picture() -> np.ndarray:
    import openslide

    with openslide.OpenSlide(REAL_DATA / "cmu_small_region.svs") as slide:
        return np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"))


def _mosaic() -> Image.Image:
    """Mirrored copies of the carcinoma picture, so that edges meet."""
    with Image.open(REAL_DATA / "hgsc_nest.jpg") as file:
        piece = file.convert("RGB")
    whole = Image.new("RGB", (WIDTH, HEIGHT))
    for column, x in enumerate(range(0, WIDTH, piece.width)):
        for row, y in enumerate(range(0, HEIGHT, piece.height)):
            copy = piece.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if column % 2 else piece
            whole.paste(copy.transpose(Image.Transpose.FLIP_TOP_BOTTOM) if row % 2 else copy, (x, y))
    return whole


def _blob(x: float, y: float, radius: float, *, seed: int) -> np.ndarray:
    """A disc with a wavy outline."""
    random = np.random.default_rng(seed)
    angle = np.linspace(0, 2 * np.pi, 240, endpoint=False)
    waves = sum(random.normal(0, 0.1) / k * np.sin(k * angle + random.uniform(0, 6)) for k in range(2, 7))
    points = np.stack([x + radius * (1 + waves) * np.cos(angle), y + radius * (1 + waves) * np.sin(angle)], 1)
    canvas = Image.new("1", (WIDTH, HEIGHT))
    ImageDraw.Draw(canvas).polygon([tuple(point) for point in points], fill=1)
    return np.asarray(canvas)


def _ink(picture: Image.Image, colour, points) -> np.ndarray:
    """Multiply a stroke onto the picture; return where it is."""
    x, y = np.array(points).T
    corner = np.array([x.min(), y.min()]) - PEN_PIXELS
    size = (int(np.ptp(x)) + 2 * PEN_PIXELS, int(np.ptp(y)) + 2 * PEN_PIXELS)
    canvas = Image.new("L", size)
    draw = ImageDraw.Draw(canvas)
    moved = [tuple(point - corner) for point in np.array(points)]
    draw.line(moved, fill=235, width=PEN_PIXELS, joint="curve")
    for x, y in moved:
        radius = PEN_PIXELS / 2
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=235)
    canvas = canvas.filter(ImageFilter.BoxBlur(6))
    ink = Image.merge("RGB", [canvas.point(_fade(channel)) for channel in colour])
    place = (*map(int, corner), *map(int, corner + size))
    picture.paste(ImageChops.multiply(picture.crop(place), ink), place)
    stroke = Image.new("1", picture.size)
    stroke.paste(canvas.point(lambda value: 255 * (value > 60)), place)
    return np.asarray(stroke)


def _fade(channel: int) -> list[int]:
    """Factor of 255 that ink of some strength leaves of a channel."""
    return [round(255 - strength * (255 - channel) / 255) for strength in range(256)]


def _dirt(picture: Image.Image, random: np.random.Generator) -> None:
    """Grey dust of up to 18 um, the edge of a cover slip, and a coloured hair."""
    draw = ImageDraw.Draw(picture)
    for _ in range(60):
        x, y = random.integers(0, WIDTH), random.integers(0, HEIGHT)
        radius, grey = int(random.integers(2, 18)), int(random.integers(60, 150))
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(grey, grey, grey + 4))
    draw.line([(0, HEIGHT - 70), (WIDTH, HEIGHT - 100)], fill=(120, 118, 125), width=10)
    draw.line([(4130, 0), (4060, HEIGHT)], fill=(150, 120, 160), width=48)
