"""A small slide set that is scored in the loop: which tiles are looked at, and the AUROC over its patients.

Tables, slides and tiles are checked before the networks are built. Where the tiles of a slide lie is decided
once and kept below ``OUT/evaluation_slides``, so that a run that is resumed looks for no tissue again. Their
pixels are read once and stay in memory, as those of :mod:`dinov2.train.monitoring.images`.
"""

import json
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from dinov2 import distributed
from dinov2.data.datasets.path_map import PathMap
from dinov2.data.slides.reader import Slide, open_slide
from dinov2.data.slides.recipe import TilingRecipe
from dinov2.data.slides.slide_list import SlideEntry, list_slides
from dinov2.data.slides.tiling import source_changes, wanted_record
from dinov2.errors import OutputError, UserError, counted
from dinov2.eval.feature_store import on_main_process
from dinov2.eval.results import SEED
from dinov2.eval.scores import DRAWS, Predictions, bootstrap, interval, score
from dinov2.eval.slides.cohort import (
    Cohort,
    Columns,
    Listed,
    Material,
    Patient,
    Problems,
    check_classes,
    read_patients,
)
from dinov2.eval.slides.extraction import dealt_out
from dinov2.eval.slides.fitting import label_numbers
from dinov2.eval.slides.folds import Fold, check_made, make_folds
from dinov2.eval.slides.in_memory import out_of_fold_scores
from dinov2.eval.slides.scouting import Scouted, ScoutingOrder, scout_ahead
from dinov2.fsdp.files import UNREADABLE, write_atomically
from dinov2.utils.strict_json import to_json

logger = logging.getLogger("dinov2")

SLIDE_AUROC = "slide_auroc"
FOLDER = "evaluation_slides"  # in the output directory: per slide, where its tiles lie, and a page to look at


@dataclass(frozen=True)
class SlideSet:
    """The patients that are scored, and the tiles of their slides.

    Attributes:
        patients: in the order of their names; a bag is a path that is the name of a slide.
        classes: in the order of the alphabet.
        folds: of the patients.
        rows: of each slide's tiles in ``tiles``.
        tiles: of ``(bytes [3, S, S], 0)``.
    """

    patients: tuple[Patient, ...]
    classes: list[str]
    folds: list[Fold]
    rows: dict[str, range]
    tiles: "SlideTiles"


class SlideTiles(Dataset):
    """The tiles of several slides, one slide after the other; a process has one slide open at a time.

    Args:
        entries: the slides.
        corners: (n, 2) level-0 pixels, of each slide.
        recipe: size and resolution of the tiles.
        assumed_mpp: of slides that state none.
        transform: from a tile as a picture to bytes [3, S, S].
    """

    def __init__(
        self,
        entries: Sequence[SlideEntry],
        corners: Sequence[np.ndarray],
        recipe: TilingRecipe,
        assumed_mpp: float | None,
        transform: Callable[[Image.Image], Tensor],
    ) -> None:
        self.entries, self.recipe, self.assumed_mpp, self.transform = entries, recipe, assumed_mpp, transform
        self.places = [(number, *xy) for number, own in enumerate(corners) for xy in own.tolist()]
        self._number, self._slide = -1, None

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        number, x, y = self.places[index]
        tile = self._opened(number).read(x, y, self.recipe.size, self.recipe.mpp)
        return self.transform(tile), 0

    def _opened(self, number: int) -> Slide:
        if number != self._number:
            self.close()
            entry = self.entries[number]
            self._slide = open_slide(entry.path, mpp=entry.mpp, assumed_mpp=self.assumed_mpp)
            self._number = number
        return self._slide

    def close(self) -> None:
        """Close the slide that is open in this process."""
        if self._slide is not None:
            self._slide.close()
        self._number, self._slide = -1, None


@dataclass(frozen=True)
class _Tables:
    """What the tables say: patients, the slides they have, and what is wrong so far."""

    patients: list[Listed]
    entries: list[SlideEntry]
    problems: Problems


def open_slide_set(cfg: DictConfig, transform: Callable[[Image.Image], Tensor]) -> SlideSet | None:
    """Check tables and slides, and find the tiles; None if no slides are named. All processes call this.

    The processes share out the slides, and each looks at the next one while one is in work.

    Args:
        cfg: resolved config.
        transform: see :class:`SlideTiles`.

    Raises:
        DatasetError: something is wrong with tables, slides or tissue; all of it is in the message.
    """
    wanted = cfg.evaluation.slides
    if not wanted.path:
        return None
    began = time.monotonic()
    tables = on_main_process(partial(_read_tables, cfg))
    recipe = TilingRecipe(
        mpp=wanted.mpp,
        size=wanted.tile_size or cfg.crops.global_crops_size,
        min_tissue=wanted.min_tissue,
        max_tiles=wanted.max_tiles,
        seed=SEED,
    )
    found = _look_at(cfg, tables.entries, recipe)
    for _, failure in found.values():
        if failure:
            tables.problems.add("slides that cannot be used (mend them, or delete their lines)", failure)
    cohort = Cohort(
        tuple(
            Patient(listed.name, listed.label, tuple(Path(slide) for slide in listed.slides))
            for listed in tables.patients
        ),
        width=0,
    )
    check_classes(cohort, wanted.folds, tables.problems, "evaluation.slides.folds")
    tables.problems.stop()
    folds = make_folds(cohort, wanted.folds, SEED)
    check_made(folds, tables.problems)
    tables.problems.stop()
    corners = [found[entry.name][0] for entry in tables.entries]
    ends = np.cumsum([len(own) for own in corners]).tolist()
    rows = {
        entry.name: range(end - len(own), end)
        for entry, own, end in zip(tables.entries, corners, ends, strict=True)
    }
    counts = Counter(patient.label for patient in cohort.patients)
    logger.info(
        "slides of evaluations in the loop: %s of %s (%s), %s, looked at in %.1f s; see %s",
        *(counted(len(rows), "slide"), counted(len(cohort.patients), "patient")),
        ", ".join(f"{name} {count}" for name, count in sorted(counts.items())),
        *(counted(ends[-1], "tile"), time.monotonic() - began, Path(cfg.train.output_dir, FOLDER)),
    )
    tiles = SlideTiles(tables.entries, corners, recipe, wanted.assume_mpp, transform)
    return SlideSet(cohort.patients, cohort.classes(), folds, rows, tiles)


def _read_tables(cfg: DictConfig) -> _Tables:
    wanted, problems = cfg.evaluation.slides, Problems()
    listed = list_slides(wanted.path, path_map=PathMap.of(cfg.train.path_map))
    entries = {entry.name: entry for entry in listed if entry.process}
    columns = Columns(wanted.target, wanted.patient_column, wanted.slide_column)
    material = Material(entries, "file", wanted.path, "add them, or delete their lines")
    patients = read_patients(wanted.labels, columns, material, problems)
    named = sorted({slide for patient in patients for slide in patient.slides})
    return _Tables(patients, [entries[name] for name in named], problems)


def _look_at(
    cfg: DictConfig, entries: Sequence[SlideEntry], recipe: TilingRecipe
) -> dict[str, tuple[np.ndarray | None, str]]:
    """Return by slide the corners of its tiles (n, 2), or None and why there are none; in all processes."""
    folder, assumed_mpp = Path(cfg.train.output_dir, FOLDER), cfg.evaluation.slides.assume_mpp
    own = dealt_out(entries, distributed.get_global_rank(), distributed.get_global_size())
    known = {entry.name: _known_corners(folder, entry, recipe, assumed_mpp) for entry in own}
    unknown = [entry for entry in own if known[entry.name] is None]
    found = {name: (corners, "") for name, corners in known.items() if corners is not None}
    order = ScoutingOrder(recipe, assumed_mpp=assumed_mpp, try_tiles=True)
    for entry, scouted in scout_ahead(unknown, order, in_process=cfg.train.num_workers == 0):
        failure = scouted.failure or scouted.facts.get("error", "")
        if failure:
            found[entry.name] = None, f"{entry.name}: {failure}"
            continue
        found[entry.name] = scouted.plan.corners, ""
        _keep(folder, entry, scouted, recipe, assumed_mpp)
    return {name: look for part in distributed.all_gather_objects(found) for name, look in part.items()}


def _known_corners(
    folder: Path, entry: SlideEntry, recipe: TilingRecipe, assumed_mpp: float | None
) -> np.ndarray | None:
    """Return the corners that were kept of a slide, None if there are none of this file and recipe."""
    try:
        kept = json.loads((folder / f"{entry.name}.json").read_text("utf-8"))
        wanted = wanted_record(entry, recipe)
        same = kept["recipe"] == _plain(recipe) and kept["assumed_mpp"] == assumed_mpp
        if not same or source_changes(kept["source"], entry, wanted["source"]):
            return None
        corners = np.array(kept["corners"], np.int64)
    except (*UNREADABLE, UserError):  # there is none yet, or it was cut short; a slide that lacks is told of
        return None
    return corners if corners.ndim == 2 else None


def _keep(
    folder: Path, entry: SlideEntry, scouted: Scouted, recipe: TilingRecipe, assumed_mpp: float | None
) -> None:
    """Write down where the tiles of a slide lie, and the page to judge it by."""
    content = {
        "corners": scouted.plan.corners.tolist(),
        "facts": scouted.facts,
        "source": scouted.source,
        "recipe": _plain(recipe),
        "assumed_mpp": assumed_mpp,
    }
    try:
        write_atomically(folder / f"{entry.name}.png", lambda file: file.write(scouted.page))
        write_atomically(
            folder / f"{entry.name}.json", lambda file: file.write(to_json(content).encode() + b"\n")
        )
    except OutputError as error:
        logger.error("where the tiles of a slide lie is not written down, the run goes on: %s", error)


def _plain(recipe: TilingRecipe) -> dict[str, Any]:
    return json.loads(json.dumps(recipe.as_dict()))


def mark_of(cfg: DictConfig, slides: SlideSet) -> str:
    """Return a text that tells apart what decides the score beside networks and pixels."""
    folds = [asdict(fold) for fold in slides.folds]
    labels = [
        (patient.name, patient.label, [str(bag) for bag in patient.bags]) for patient in slides.patients
    ]
    rows = [(name, own.start, own.stop) for name, own in slides.rows.items()]
    return json.dumps([cfg.evaluation.slides.aggregator, folds, labels, rows])


def slide_scores(
    cfg: DictConfig, slides: SlideSet, features: Tensor
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Return the AUROC of the patients and its bootstrap interval over them, each by its name.

    Patients are scored by models that have not seen them, see
    :func:`~dinov2.eval.slides.in_memory.out_of_fold_scores`; the probabilities of all folds are scored
    together. NaN, without an interval, where features are not finite.

    Args:
        cfg: resolved config.
        slides: the set.
        features: (n, D) float32 on the CPU, of its tiles.
    """
    if not features.isfinite().all():
        return {SLIDE_AUROC: math.nan}, {}
    held = {name: features[own.start : own.stop] for name, own in slides.rows.items()}
    probabilities = out_of_fold_scores(
        held, slides.patients, slides.classes, slides.folds, cfg.evaluation.slides.aggregator, seed=SEED
    )
    predictions = Predictions(label_numbers(slides.patients, slides.classes), probabilities)
    draws = bootstrap(predictions, DRAWS, SEED)
    return {SLIDE_AUROC: score(predictions)["auroc"]}, {SLIDE_AUROC: tuple(interval(draws["auroc"]))}
