"""The two small labelled tasks on which the backbone is scored before and after.

Tissue windows: 112 px windows of the slide, labelled by eye. Nucleus windows: 112 px windows of the
carcinoma picture, labelled by the type that most of their nuclei have, shown in grey with equal mean and
contrast so that the stain gives nothing away. ``scripts/data/README.md`` says where the labels come from and
what they can show.
"""

import csv
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from scripts.quickstart.tiles import CARCINOMA, DATA, read_slide

TISSUE_TABLE = DATA / "cmu1_small_region_tissue.csv"
NUCLEI_TABLE = DATA / "hgsc_nuclei.csv"

WINDOW_PIXELS = 112
NUCLEUS_STRIDE_PIXELS = 56
MIN_NUCLEI = 3
MIN_SHARE = 0.7
MAX_PER_CLASS_AND_SPLIT = 60

# Every grey window gets this mean and standard deviation (0..255).
GREY_MEAN, GREY_STD = 128.0, 45.0


@dataclass(frozen=True)
class Window:
    """A labelled square of a picture; ``split`` is ``train`` or ``test``, ``x, y`` its corner in pixels."""

    x: int
    y: int
    label: str
    split: str


@dataclass(frozen=True)
class Task:
    """A labelled task: the pixels of its windows, train and test apart.

    Attributes:
        name: Short name for tables.
        classes: Class names; labels index into them.
        pixels: Per split, (n, 112, 112, 3) uint8.
        labels: Per split, (n,) int64.
    """

    name: str
    classes: list[str]
    pixels: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]


def tissue_windows(table: Path = TISSUE_TABLE) -> list[Window]:
    """Read the labelled windows of the slide: background, epithelium or stroma."""
    with table.open(newline="", encoding="utf-8") as stream:
        return [
            Window(int(row["x"]), int(row["y"]), row["label"], row["split"]) for row in csv.DictReader(stream)
        ]


def nucleus_windows(size: tuple[int, int], table: Path = NUCLEI_TABLE) -> list[Window]:
    """Choose windows of the carcinoma picture in which one nucleus type prevails.

    Windows of the upper half train and windows of the lower half test; none crosses the middle row, so no
    pixel is on both sides. A class with more than 60 windows on a side keeps 60, evenly spread.

    Args:
        size: Width and height of the picture in pixels.
        table: Nucleus centres with their types.
    """
    width, height = size
    with table.open(newline="", encoding="utf-8") as stream:
        rows = [row for row in csv.DictReader(stream) if row["image"] == CARCINOMA.name]
    centres = np.array([[float(row["x"]), float(row["y"])] for row in rows])
    types = np.array([row["label"] for row in rows])

    found = defaultdict(list)
    for y in range(0, height - WINDOW_PIXELS + 1, NUCLEUS_STRIDE_PIXELS):
        if y < height // 2 < y + WINDOW_PIXELS:
            continue
        split = "train" if y < height // 2 else "test"
        for x in range(0, width - WINDOW_PIXELS + 1, NUCLEUS_STRIDE_PIXELS):
            inside = ((centres >= (x, y)) & (centres < (x + WINDOW_PIXELS, y + WINDOW_PIXELS))).all(axis=1)
            label = _prevailing(types[inside])
            if label is not None:
                found[split, label].append(Window(x, y, label, split))
    return [window for _, windows in sorted(found.items()) for window in _spread(windows)]


def tissue_task() -> Task:
    """The tissue windows of the slide, in colour."""
    return _make_task("tissue (colour)", np.asarray(read_slide()), tissue_windows())


def nucleus_task() -> Task:
    """The nucleus-type windows of the carcinoma picture, in grey."""
    picture = Image.open(CARCINOMA).convert("RGB")
    task = _make_task("nuclei (grey)", np.asarray(picture), nucleus_windows(picture.size))
    grey = {split: np.stack([equal_grey(window) for window in task.pixels[split]]) for split in task.pixels}
    return Task(task.name, task.classes, grey, task.labels)


def equal_grey(window: np.ndarray) -> np.ndarray:
    """Turn one (H, W, 3) uint8 window grey and give it the common mean and contrast; shape and type stay."""
    grey = window @ np.array([0.299, 0.587, 0.114])
    grey = (grey - grey.mean()) / max(grey.std(), 1.0) * GREY_STD + GREY_MEAN
    return np.repeat(grey.round().clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)


def _prevailing(types: np.ndarray) -> str | None:
    if len(types) < MIN_NUCLEI:
        return None
    label, count = Counter(types.tolist()).most_common(1)[0]
    return label if count >= MIN_SHARE * len(types) else None


def _spread(windows: list[Window]) -> list[Window]:
    """At most 60 of the windows, evenly spaced in reading order."""
    keep = np.linspace(0, len(windows) - 1, min(len(windows), MAX_PER_CLASS_AND_SPLIT)).round().astype(int)
    return [windows[index] for index in keep]


def _make_task(name: str, picture: np.ndarray, windows: Iterable[Window]) -> Task:
    windows = list(windows)
    classes = sorted({window.label for window in windows})
    pixels, labels = {}, {}
    for split in ("train", "test"):
        chosen = [window for window in windows if window.split == split]
        pixels[split] = np.stack(
            [picture[w.y : w.y + WINDOW_PIXELS, w.x : w.x + WINDOW_PIXELS] for w in chosen]
        )
        labels[split] = np.array([classes.index(window.label) for window in chosen])
    return Task(name, classes, pixels, labels)
