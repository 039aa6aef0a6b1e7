"""Finds the tissue of a slide on a thumbnail: Otsu's threshold on saturation, then shape and area.

Defaults follow what slide pipelines share: saturation at 8 um per pixel, a median against speckle, a closing
of a few cells' width. Parts need the area of two fields of 512 px at 40x (0.033 mm2); holes up to a fat
cell's (100 um across) count as tissue, larger ones are glass.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from dinov2.data.slides.quality import ColourPlanes, balance_glass, find_grey, find_pen, find_threads
from dinov2.data.slides.tissue_mask import TissueMask
from dinov2.errors import ConfigError

if TYPE_CHECKING:
    from dinov2.data.slides.reader import Slide

MAX_MPP = 8.0


@dataclass(frozen=True)
class SegmentationSettings:
    """How :func:`segment_tissue` decides; part of the recipe that a tiled slide records.

    Args:
        mpp: microns per pixel of the thumbnail, at most 8.
        lowest_threshold: floor of Otsu's threshold on saturation (0 to 1): below it colour is noise, so an
            empty slide gives an empty mask.
        highest_threshold: ceiling: a slide full of tissue, or stained strongly, must not lose its pale parts.
        median_um: side of the median filter on saturation.
        closing_um: gaps up to this width are closed.
        min_area_um2: smaller parts are dropped.
        max_hole_um2: holes up to this area count as tissue, larger ones stay holes.
        max_thread_um: parts nowhere wider than this are dropped as fibres and edges.
        pen: whether marker ink is looked for; off for blue and green stains.
    """

    mpp: float = 8.0
    lowest_threshold: float = 0.06
    highest_threshold: float = 0.12
    median_um: float = 40.0
    closing_um: float = 40.0
    min_area_um2: float = 32_768.0
    max_hole_um2: float = 8_192.0
    max_thread_um: float = 32.0
    pen: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.mpp <= MAX_MPP:
            raise ConfigError(
                f"the tissue is looked for at {self.mpp} um per pixel, but cells need at most {MAX_MPP:g}: "
                f"give a number above 0 and up to {MAX_MPP:g}"
            )


def segment_tissue(
    slide: "Slide",
    *,
    mpp: float = MAX_MPP,
    settings: SegmentationSettings | None = None,
    picture: Image.Image | None = None,
) -> TissueMask:
    """Find the tissue of an open slide.

    Args:
        slide: an open slide.
        mpp: microns per pixel of the thumbnail to look at, at most 8; unused with ``settings``.
        settings: all choices; the defaults at ``mpp`` if None.
        picture: the whole slide as that thumbnail, if it has been read already.

    Raises:
        ConfigError: ``mpp`` is above 8 or not positive, or scipy is missing.
        ImageReadError: the slide can not be read.
    """
    settings = settings or SegmentationSettings(mpp=mpp)
    if picture is None:
        picture = slide.thumbnail(max_side=overview_side(slide, settings.mpp))
    downsample = (slide.dimensions[0] / picture.width, slide.dimensions[1] / picture.height)
    found = segment_picture(np.asarray(picture), pixel_um=slide.mpp * max(downsample), settings=settings)
    return TissueMask(
        found.tissue, downsample, slide.mpp, found.pen, found.artefact, threshold=found.threshold
    )


def overview_side(slide: "Slide", mpp: float) -> int:
    """Return the longer side, in pixels, of a picture of the whole slide that is no coarser than ``mpp``."""
    return math.ceil(max(slide.dimensions) * min(1.0, slide.mpp / mpp))


@dataclass(frozen=True)
class Segmented:
    """Masks of one picture, all (H, W) bool, and the threshold that was used."""

    tissue: np.ndarray
    pen: np.ndarray
    artefact: np.ndarray
    threshold: float


def segment_picture(
    picture: np.ndarray, *, pixel_um: float, settings: SegmentationSettings | None = None
) -> Segmented:
    """Find the tissue in a picture of a slide.

    Args:
        picture: (H, W, 3) uint8.
        pixel_um: side of a pixel in microns.
        settings: the defaults if None.

    Raises:
        ConfigError: scipy is missing.
    """
    ndimage = _scipy_ndimage()
    settings = settings or SegmentationSettings()
    planes = ColourPlanes.of(balance_glass(picture))
    pen = find_pen(planes, pixel_um=pixel_um) if settings.pen else np.zeros(picture.shape[:2], bool)
    grey = find_grey(planes) & ~pen
    unwanted = pen | grey

    levels = np.round(planes.saturation * 255).astype(np.uint8)
    levels = ndimage.median_filter(levels, size=_odd(settings.median_um / pixel_um))
    # Ink and dust would pull the threshold towards themselves.
    candidates = levels[~unwanted]
    otsu = otsu_threshold(candidates) / 255 if candidates.size else 0.0
    threshold = float(np.clip(otsu, settings.lowest_threshold, settings.highest_threshold))
    tissue = (levels > threshold * 255) & ~unwanted
    return _clean(tissue, pen, grey, threshold, pixel_um, settings)


def otsu_threshold(values: np.ndarray) -> int:
    """Return the value that splits uint8 values into two classes of least variance (Otsu 1979).

    The upper class lies above the threshold. Values that are all alike give that value.
    """
    counts = np.bincount(values.ravel(), minlength=256).astype(np.float64)
    levels = np.arange(256)
    below, total = np.cumsum(counts), counts.sum()
    sum_below = np.cumsum(counts * levels)
    above = total - below
    with np.errstate(divide="ignore", invalid="ignore"):
        distance = sum_below / below - (sum_below[-1] - sum_below) / above
        between = np.nan_to_num(below * above * distance**2, nan=-1.0)
    best = int(between.argmax())
    return best if between[best] > 0 else int(values.flat[0])


def _clean(
    tissue: np.ndarray,
    pen: np.ndarray,
    grey: np.ndarray,
    threshold: float,
    pixel_um: float,
    settings: SegmentationSettings,
) -> Segmented:
    """Close gaps, drop small parts and threads, fill small holes; what was removed as unwanted stays out."""
    unwanted = pen | grey
    tissue = _close(tissue, round(settings.closing_um / pixel_um / 2)) & ~unwanted
    tissue &= ~_small_parts(tissue, settings.min_area_um2 / pixel_um**2)
    threads = find_threads(tissue, pixel_um=pixel_um, max_width_um=settings.max_thread_um)
    tissue &= ~threads
    tissue |= _small_parts(~tissue, settings.max_hole_um2 / pixel_um**2) & ~unwanted & ~threads
    return Segmented(tissue, pen, grey | threads, threshold)


def _close(mask: np.ndarray, radius: int) -> np.ndarray:
    ndimage = _scipy_ndimage()
    if radius < 1:
        return mask
    span = np.arange(-radius, radius + 1)
    disc = span[:, None] ** 2 + span**2 <= radius**2
    # Without a rim of its own the erosion would eat tissue at the border of the picture.
    padded = np.pad(mask, radius, mode="edge")
    return ndimage.binary_closing(padded, disc)[radius:-radius, radius:-radius]


def _small_parts(mask: np.ndarray, min_pixels: float) -> np.ndarray:
    """Return the connected parts (4 neighbours) of a mask that have fewer pixels than the limit."""
    labels, _ = _scipy_ndimage().label(mask)
    small = np.bincount(labels.ravel()) < min_pixels
    small[0] = False
    return small[labels]


def _odd(pixels: float) -> int:
    return 2 * round(max(0.0, pixels - 1) / 2) + 1


def _scipy_ndimage():
    try:
        from scipy import ndimage
    except ImportError as error:
        raise ConfigError(
            "finding tissue needs the package scipy: pip install -e '.[slides]', or give a mask per slide"
        ) from error
    return ndimage
