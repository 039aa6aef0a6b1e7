"""Cuts the shipped slide and picture into tiles, in the folder layout the ``Pathology`` dataset reads.

``<root>/patches/<slide>/<slide>_patch_<n>.jpeg`` are the tiles, ``<root>/entry.csv`` names the patches
folder, ``<root>/extra/entries-TRAIN.npy`` is the index that :meth:`Pathology.dump_extra` writes.
"""

import csv
import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from dinov2.data.datasets import Pathology
from dinov2.data.slides import open_slide
from dinov2.errors import DatasetError

DATA = Path(__file__).resolve().parents[1] / "data"
SLIDE = DATA / "cmu_small_region.svs"
CARCINOMA = DATA / "hgsc_nest.jpg"

TILE_PIXELS = 224
STRIDE_PIXELS = 112
JPEG_QUALITY = 95
MIN_TISSUE_FRACTION = 0.4

# Labelled test windows of the carcinoma picture lie below this row; the training never sees those pixels.
CARCINOMA_TRAIN_ROWS = 686


@dataclass(frozen=True)
class TileSet:
    """A tile folder that the trainer can read.

    Attributes:
        root: Folder with ``patches``, ``entry.csv``, ``extra``.
        counts: Number of tiles per slide name.
        reused: Whether the folder was there already, made with the same settings.
    """

    root: Path
    counts: dict[str, int]
    reused: bool

    @property
    def dataset_string(self) -> str:
        """The dataset string for ``train.dataset_path``."""
        return f"Pathology:split=TRAIN:root={self.root}:extra={self.root / 'extra'}:sshid=13"


def read_slide(path: Path = SLIDE) -> Image.Image:
    """Return level 0 of a small slide as one RGB picture (2220 x 2967 pixels for the shipped one)."""
    with open_slide(str(path)) as slide:
        return slide.read(0, 0, slide.dimensions, slide.mpp)


def tissue_mask(picture: np.ndarray) -> np.ndarray:
    """Tell tissue from glass: coloured pixels that are neither bright as glass nor black as ink.

    Args:
        picture: (H, W, 3) uint8.

    Returns:
        (H, W) bool.
    """
    brightest = picture.max(axis=2).astype(np.float32)
    saturation = 1 - picture.min(axis=2) / np.maximum(brightest, 1)
    return (saturation > 0.08) & (brightest < 245) & (brightest > 40)


def tile_corners(
    mask: np.ndarray, *, size: int = TILE_PIXELS, stride: int = STRIDE_PIXELS
) -> Iterator[tuple[int, int]]:
    """Yield the ``(x, y)`` corners of the tiles that hold enough tissue, row by row."""
    height, width = mask.shape
    for y in range(0, height - size + 1, stride):
        for x in range(0, width - size + 1, stride):
            if mask[y : y + size, x : x + size].mean() >= MIN_TISSUE_FRACTION:
                yield x, y


def make_tiles(root: Path, *, slide: Path = SLIDE, carcinoma: Path | None = CARCINOMA) -> TileSet:
    """Cut the slide and the upper part of the carcinoma picture into tiles under ``root``.

    A folder made earlier from the same files with the same settings is used again.

    Args:
        root: Folder to make; its content is replaced when its settings differ.
        slide: A slide that states the size of its pixels.
        carcinoma: A picture of which only the first ``CARCINOMA_TRAIN_ROWS`` rows are cut, or None.

    Raises:
        DatasetError: The slide can not be opened, or no tile holds tissue.
    """
    settings = _settings([slide, *([carcinoma] if carcinoma else [])])
    stamp = root / "tiles.json"
    known = json.loads(stamp.read_text("utf-8")) if stamp.is_file() else {}
    if known.get("settings") == settings:
        return TileSet(root, known["counts"], reused=True)

    for part in ("patches", "extra"):
        shutil.rmtree(root / part, ignore_errors=True)
    stamp.unlink(missing_ok=True)
    (root / "extra").mkdir(parents=True)
    counts = {slide.stem: _write_tiles(read_slide(slide), slide.stem, root)}
    if carcinoma is not None:
        picture = Image.open(carcinoma).convert("RGB")
        picture = picture.crop((0, 0, picture.width, CARCINOMA_TRAIN_ROWS))
        counts[carcinoma.stem] = _write_tiles(picture, carcinoma.stem, root)
    if not sum(counts.values()):
        raise DatasetError(
            f"no tile of {slide} holds {MIN_TISSUE_FRACTION:.0%} tissue; give a slide with tissue on it"
        )
    with (root / "entry.csv").open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([["patches_path"], [str(root / "patches")]])
    Pathology(split=Pathology.Split.TRAIN, root=str(root), extra=str(root / "extra"), sshid="13").dump_extra()
    stamp.write_text(json.dumps({"settings": settings, "counts": counts}, indent=1), "utf-8")
    return TileSet(root, counts, reused=False)


def _settings(sources: list[Path]) -> dict:
    return {
        "sources": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sources},
        "tile": TILE_PIXELS,
        "stride": STRIDE_PIXELS,
        "quality": JPEG_QUALITY,
        "min_tissue_fraction": MIN_TISSUE_FRACTION,
        "carcinoma_rows": CARCINOMA_TRAIN_ROWS,
    }


def _write_tiles(picture: Image.Image, name: str, root: Path) -> int:
    """Write the tissue tiles of one picture; return how many."""
    folder = root / "patches" / name
    folder.mkdir(parents=True)
    number = 0
    for number, (x, y) in enumerate(tile_corners(tissue_mask(np.asarray(picture))), start=1):
        tile = picture.crop((x, y, x + TILE_PIXELS, y + TILE_PIXELS))
        # Full colour resolution: JPEG's usual halving blurs the edges of nuclei.
        tile.save(folder / f"{name}_patch_{number}.jpeg", quality=JPEG_QUALITY, subsampling=0)
    return number
