"""Tissue masks made elsewhere: pictures, arrays, and outlines drawn in QuPath (GeoJSON)."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from dinov2.data.slides.tissue_mask import TissueMask
from dinov2.errors import DatasetError

if TYPE_CHECKING:
    from dinov2.data.slides.reader import Slide

PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
OUTLINES = (".geojson", ".json")
# A mask is some downsampled version of the slide, whose sides were rounded to whole pixels.
_SHAPE_TOLERANCE = 0.02


def read_mask(path: str, slide: "Slide", *, mpp: float = 8.0) -> TissueMask:
    """Return the tissue mask of a slide from a file.

    Args:
        path: a picture or ``.npy`` array of the whole slide at any resolution, tissue where it is not 0; or
            GeoJSON in level-0 pixels, of which polygons are tissue, their inner rings holes, and features of
            a class that QuPath ignores (a name that ends with ``*``) are cut out.
        slide: the slide it belongs to.
        mpp: resolution at which outlines are drawn, in um per pixel.

    Raises:
        DatasetError: the file is missing, of another kind, or does not have the shape of the slide.
    """
    suffix = Path(path).suffix.lower()
    if not Path(path).is_file():
        raise DatasetError(f'the mask "{path}" is missing: correct its path, or leave it empty')
    if suffix in OUTLINES:
        mask, downsample = _draw_outlines(path, slide.dimensions, max(1.0, mpp / slide.mpp))
        return TissueMask(mask, downsample, slide.mpp, source=Path(path).name)
    if suffix != ".npy" and suffix not in PICTURES:
        raise DatasetError(
            f'the mask "{path}" is of an unknown kind; accepted are .npy, {", ".join(PICTURES + OUTLINES)}'
        )
    mask = _read_array(path) if suffix == ".npy" else _read_picture(path)
    width, height = slide.dimensions
    if abs(mask.shape[1] * height / (mask.shape[0] * width) - 1) > _SHAPE_TOLERANCE + 1 / min(mask.shape):
        raise DatasetError(
            f'the mask "{path}" has {mask.shape[1]} x {mask.shape[0]} pixels, which is not the shape of the '
            f"slide, {width} x {height}: give a mask of the whole slide"
        )
    downsample = (width / mask.shape[1], height / mask.shape[0])
    return TissueMask(mask, downsample, slide.mpp, source=Path(path).name)


def _read_array(path: str) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DatasetError(f'the mask "{path}" can not be read ({error}): save it with numpy.save') from error
    if array.ndim != 2 or not array.size:
        raise DatasetError(f'the mask "{path}" has the shape {array.shape}; it takes an array [H, W]')
    return array != 0


def _read_picture(path: str) -> np.ndarray:
    try:
        with Image.open(path) as picture:
            # Palette numbers are labels; their colours mean nothing.
            plain = picture if picture.mode in ("1", "P", "L", "I;16", "I", "F") else picture.convert("L")
            return np.asarray(plain) != 0
    except (OSError, Image.DecompressionBombError) as error:
        raise DatasetError(f'the mask "{path}" can not be read ({error}): save it as PNG') from error


def _draw_outlines(
    path: str, dimensions: tuple[int, int], factor: float
) -> tuple[np.ndarray, tuple[float, float]]:
    """Return the mask of a GeoJSON file, and the level-0 pixels per pixel, about ``factor``."""
    try:
        content = json.loads(Path(path).read_text("utf-8"))
    except ValueError as error:
        raise DatasetError(f'the mask "{path}" is not JSON ({error}): export it as GeoJSON') from error
    width, height = (max(1, round(side / factor)) for side in dimensions)
    downsample = (dimensions[0] / width, dimensions[1] / height)
    tissue, ignored = np.zeros((height, width), bool), np.zeros((height, width), bool)
    found = False
    for feature in _features(content):
        target = ignored if _class_of(feature).endswith("*") else tissue
        for rings in _polygons(feature.get("geometry") or {}, path):
            _draw(target, rings, downsample)
            found = True
    if not found:
        raise DatasetError(f'the mask "{path}" has no polygon: draw tissue outlines and export them again')
    return tissue & ~ignored, downsample


def _features(content: Any) -> list[dict]:
    if isinstance(content, list):
        return [item for part in content for item in _features(part)]
    if not isinstance(content, dict):
        return []
    if content.get("type") == "FeatureCollection":
        return _features(content.get("features") or [])
    return [content] if content.get("type") == "Feature" else [{"geometry": content}]


def _class_of(feature: dict) -> str:
    named = (feature.get("properties") or {}).get("classification") or {}
    return str(named.get("name", "")) if isinstance(named, dict) else str(named)


def _polygons(geometry: dict, path: str) -> list[list[np.ndarray]]:
    """Return the polygons of a geometry, each as its rings, (n, 2) level-0 x and y, the outer one first."""
    kind = geometry.get("type")
    if kind == "GeometryCollection":
        return [rings for part in geometry.get("geometries", []) for rings in _polygons(part, path)]
    if kind not in ("Polygon", "MultiPolygon"):
        raise DatasetError(
            f'the mask "{path}" has a geometry "{kind}"; accepted are Polygon and MultiPolygon: '
            "export areas, not points or lines"
        )
    nested = [geometry["coordinates"]] if kind == "Polygon" else geometry["coordinates"]
    try:
        return [[np.array(ring, float)[:, :2] for ring in polygon] for polygon in nested if polygon]
    except (ValueError, IndexError, TypeError) as error:
        raise DatasetError(
            f'the mask "{path}" has a polygon that is no list of x and y ({error}): export it again'
        ) from error


def _draw(target: np.ndarray, rings: list[np.ndarray], downsample: tuple[float, float]) -> None:
    """Add to a mask the pixels whose middle lies in a polygon, and not in one of its holes.

    Going along a row, every ring that is crossed changes between outside and inside.
    """
    crossings = [_crossings(ring / downsample, target.shape[0]) for ring in rings]
    rows, columns = (np.concatenate(part) for part in zip(*crossings, strict=True))
    if not len(rows):
        return
    columns = columns.clip(0, target.shape[1])
    top, left = rows.min(), columns.min()
    changes = np.zeros((rows.max() - top + 1, columns.max() - left + 1), np.uint8)
    np.add.at(changes, (rows - top, columns - left), 1)
    inside = np.cumsum(changes, axis=1, dtype=np.uint8)[:, :-1] % 2 == 1
    target[top : top + inside.shape[0], left : left + inside.shape[1]] |= inside


def _crossings(ring: np.ndarray, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows whose middle a ring crosses, and the first column behind each crossing."""
    start, end = ring, np.roll(ring, -1, axis=0)
    low, high = np.minimum(start[:, 1], end[:, 1]), np.maximum(start[:, 1], end[:, 1])
    first, stop = (np.ceil(y - 0.5).clip(0, height).astype(np.int64) for y in (low, high))
    counts = stop - first
    edge = np.repeat(np.arange(len(ring)), counts)
    rows = np.arange(len(edge)) - np.repeat(np.cumsum(counts) - counts - first, counts)
    (x0, y0), (x1, y1) = start[edge].T, end[edge].T
    columns = np.ceil(x0 + (rows + 0.5 - y0) / (y1 - y0) * (x1 - x0) - 0.5)
    return rows, columns.astype(np.int64)
