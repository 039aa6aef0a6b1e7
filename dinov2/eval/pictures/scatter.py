"""Features in the plane of their first two principal components, with thumbnails of some tiles."""

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw

from dinov2.eval.pictures.canvas import FAINT, INK, LINE, MARGIN, PAPER, colour_of, fitted, font

WIDTH, HEIGHT, LEGEND = 1100, 820, 200
THUMBNAIL, FRAME, DOT = 52, 3, 3
MOST_THUMBNAILS = 120
GREY = (110, 110, 110)


def plane(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return coordinates (n, 2) of unit-length features (n, D), and the shares of the variance (2,).

    The signs are fixed: of each direction the entry of the largest magnitude is positive.
    """
    unit = features.astype(np.float64)
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True).clip(min=1e-12)
    unit -= unit.mean(axis=0)
    variances, vectors = np.linalg.eigh(unit.T @ unit)
    variances, directions = variances[::-1].clip(min=0), vectors[:, ::-1][:, :2]
    strongest = np.abs(directions).argmax(axis=0)
    directions = directions * np.sign(directions[strongest, range(2)])
    return unit @ directions, variances[:2] / max(variances.sum(), 1e-300)


def scatter(
    coordinates: np.ndarray,
    shares: np.ndarray,
    labels: np.ndarray | None,
    classes: Sequence[str],
    thumbnail: Callable[[int], Image.Image],
    seed: int = 0,
) -> Image.Image:
    """Draw the samples, and tiles where there is room.

    Args:
        coordinates: (n, 2).
        shares: (2,), of the variance, for the axes.
        labels: (n,), or None for samples without a class.
        classes: Their names.
        thumbnail: Returns the picture of a sample.
        seed: Of the order in which samples get a thumbnail, so that no class comes first.
    """
    page = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((MARGIN, MARGIN), "Principal components of the cls features", INK, font())
    left, top = MARGIN + THUMBNAIL, 2 * MARGIN + LINE + THUMBNAIL
    right, bottom = WIDTH - LEGEND - THUMBNAIL, HEIGHT - 2 * MARGIN - LINE - THUMBNAIL
    low, high = coordinates.min(axis=0), coordinates.max(axis=0)
    scaled = (coordinates - low) / np.where(high > low, high - low, 1.0)
    spots = np.stack([left + scaled[:, 0] * (right - left), bottom - scaled[:, 1] * (bottom - top)], axis=1)
    edge = THUMBNAIL // 2 + FRAME
    draw.rectangle((left - edge, top - edge, right + edge, bottom + edge), outline=FAINT)
    draw.text((left, bottom + edge + 4), f"component 1 ({shares[0]:.0%} of the variance)", INK, font())
    draw.text((MARGIN, top - edge - LINE), f"component 2 ({shares[1]:.0%})", INK, font())
    tints = [GREY] * len(spots) if labels is None else [colour_of(int(label)) for label in labels]
    for (x, y), tint in zip(spots, tints, strict=True):
        draw.ellipse((x - DOT, y - DOT, x + DOT, y + DOT), fill=tint)
    order = np.random.default_rng(seed).permutation(len(spots))
    for index in order[apart(spots[order], THUMBNAIL + 2 * FRAME, MOST_THUMBNAILS)].tolist():
        x, y = (int(value) - THUMBNAIL // 2 for value in spots[index])
        draw.rectangle(
            (x - FRAME, y - FRAME, x + THUMBNAIL + FRAME - 1, y + THUMBNAIL + FRAME - 1), fill=tints[index]
        )
        page.paste(thumbnail(index).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC), (x, y))
    if labels is not None:
        _legend(draw, labels, classes)
    return page


def _legend(draw: ImageDraw.ImageDraw, labels: np.ndarray, classes: Sequence[str]) -> None:
    x, y = WIDTH - LEGEND + MARGIN, 2 * MARGIN + LINE
    for label, count in zip(*np.unique(labels, return_counts=True), strict=True):
        draw.rectangle((x, y + 2, x + 12, y + 14), fill=colour_of(int(label)))
        text = fitted(f"{classes[label]} ({count})", LEGEND - 2 * MARGIN - 20)
        draw.text((x + 20, y), text, INK, font())
        y += LINE + 4


def apart(spots: np.ndarray, distance: float, most: int) -> list[int]:
    """Choose samples in their order, none nearer than ``distance`` to one before in both directions."""
    chosen: list[int] = []
    for index, spot in enumerate(spots):
        if len(chosen) == most:
            break
        if all(np.abs(spot - spots[other]).max() >= distance for other in chosen):
            chosen.append(index)
    return chosen
