"""What a run left in its output folder, read for the report.

A folder may be that of a training, of an evaluation, or both. The training's own modules are not needed: its
files are JSON lines and YAML.
"""

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from dinov2.errors import DatasetError, counted
from dinov2.eval.predictions import read_predictions
from dinov2.eval.scores import Predictions

TRAINING_FILE = "training_metrics.json"
RECORDS_FILE = "evaluation_metrics.json"
SUMMARY = re.compile(r"results_eval_(\w+)_summary\.json")
# Folders of a run that hold no results and may hold many files.
SKIPPED_FOLDERS = {"checkpoints", "features", "logs", "pictures", "tensorboard", "wandb"}
USUAL_K = 20
ALL_FOLDS = ("pooled", "ensemble")  # rows of slides: the test patients of all folds, the mean of all models


@dataclass(frozen=True)
class Result:
    """One row of the summary of an evaluation, and what the summary says of all its rows."""

    path: Path
    summary: dict[str, Any]
    row: dict[str, Any]

    @property
    def evaluation(self) -> str:
        """Its name, such as ``knn``."""
        return self.summary["evaluation"]

    @property
    def role(self) -> str:
        """What the dataset was used for, such as ``val``."""
        return self.row["role"]

    @property
    def samples_are(self) -> str:
        """What was judged, in words."""
        return "patients" if self.evaluation == "slides" else "images"

    @property
    def setting(self) -> str:
        """The setting in words, such as ``train samples full, k 20``, or ``fold 0``, which says so itself."""
        words = ((name.replace("_", " "), str(value)) for name, value in self.row["setting"].items())
        return ", ".join(
            value if value.startswith(f"{name} ") else f"{name} {value}" for name, value in words
        )

    @property
    def classes(self) -> list[str]:
        """Names of the classes, numbers where they have none."""
        count = len(self.row["confusion_matrix"])
        names = self.summary.get("classes")
        return list(names) if names and len(names) == count else [str(number) for number in range(count)]

    @property
    def predictions_path(self) -> Path | None:
        """The file of predictions; None without one, and with several of repeated tries."""
        names = self.row.get("predictions") or []
        path = self.path.parent / names[0] if len(names) == 1 else None
        return path if path and path.is_file() else None

    @cached_property
    def predictions(self) -> Predictions | None:
        """The predictions, if there is one file of them."""
        return read_predictions(self.predictions_path)[0] if self.predictions_path else None


@dataclass(frozen=True)
class Robustness:
    """A summary of how features bear changes of stain, scanner and centre."""

    path: Path
    summary: dict[str, Any]


@dataclass(frozen=True)
class Picture:
    """A PNG file and its caption."""

    path: Path
    caption: str


@dataclass(frozen=True)
class Run:
    """All that was found in one folder.

    Attributes:
        name: What the page calls it.
        folder: Where it lies.
        training: Rows of the training, by iteration.
        records: Evaluations in the loop, by iterations done.
        config: Dotted key -> value as text; empty without a ``config.yaml``.
        best: The chosen iteration, its signal and why; None where nothing was chosen.
        results: Rows of evaluations, in the order of their files.
        robustness: Summaries of robustness, in the order of their files.
        pictures: In the order of their names.
        notes: What a reader should know of the files, a sentence each.
    """

    name: str
    folder: Path
    training: list[dict[str, Any]] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, str] = field(default_factory=dict)
    best: dict[str, Any] | None = None
    results: list[Result] = field(default_factory=list)
    robustness: list[Robustness] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def shown(self) -> list[Result]:
        """Return the one result of each evaluation and role that the page shows in detail.

        Of several folders, that of the chosen iteration, else the last; of several settings, that with 20
        neighbours or of all folds together, else the first.
        """
        groups: dict[tuple[str, str], list[Result]] = {}
        for result in self.results:
            groups.setdefault((result.evaluation, result.role), []).append(result)
        return [self._pick(group) for group in groups.values()]

    def _pick(self, group: list[Result]) -> Result:
        folders = sorted({result.path.parent for result in group}, key=_natural)
        chosen = [f for f in folders if self.best and f"training_{self.best['iteration'] - 1}" in f.parts]
        folder = (chosen or folders)[-1]
        group = [result for result in group if result.path.parent == folder]
        usual = [
            result
            for result in group
            if result.row["setting"].get("k") == USUAL_K or result.row["setting"].get("fold") in ALL_FOLDS
        ]
        return (usual or group)[0]


def collect(folder: str | Path, name: str) -> Run:
    """Read a folder.

    Raises:
        DatasetError: There is no such folder, it holds nothing to show, or a file in it is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DatasetError(
            f'there is no folder "{folder}": name the output directory of a training or of an evaluation'
        )
    notes: list[str] = []
    training = _by_iteration(folder / TRAINING_FILE, notes)
    records = _by_iteration(folder / RECORDS_FILE, notes)
    for record in records:
        if not isinstance(record.get("signals"), dict):
            raise _damaged(folder / RECORDS_FILE, "a line has no signals")
    summaries = [(path, _json(path)) for path in _find(folder)]
    of_robustness = [(path, content) for path, content in summaries if _is_robustness(content)]
    results = list(_results(item for item in summaries if item not in of_robustness))
    robustness = [_robustness(path, content) for path, content in of_robustness]
    pictures = _pictures(folder)
    if not (training or records or results or robustness or pictures):
        raise DatasetError(
            f'"{folder}" holds nothing to show: {TRAINING_FILE}, {RECORDS_FILE}, '
            "results_eval_<evaluation>_summary.json and pictures/*.png were looked for"
        )
    return Run(
        name=name,
        folder=folder,
        training=training,
        records=records,
        config=_config(folder / "config.yaml"),
        best=_best(folder / "best" / "best.json"),
        results=results,
        robustness=robustness,
        pictures=pictures,
        notes=notes,
    )


def finite(value: Any) -> float | None:
    """Return a number of a JSON file, None where it is not defined."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def require_same_classes(runs: Sequence[Run]) -> None:
    """Check that runs judged by the same evaluation were judged on the same classes.

    Raises:
        DatasetError: They were not.
    """
    known: dict[tuple[str, str], tuple[Run, list[str]]] = {}
    for run in runs:
        for result in run.shown():
            if "confusion_matrix" not in result.row:
                continue
            first, classes = known.setdefault((result.evaluation, result.role), (run, result.classes))
            if classes != result.classes:
                raise DatasetError(
                    f'the {result.evaluation} results of "{first.folder}" and "{run.folder}" have other '
                    f"classes ({', '.join(classes)}; {', '.join(result.classes)}): compare runs that were "
                    "evaluated on one dataset"
                )


def _by_iteration(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Read JSON lines; of several rows of one iteration, the last counts."""
    rows: dict[int, dict[str, Any]] = {}
    lines = _text(path).splitlines() if path.is_file() else []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            rows[int(row["iteration"])] = row
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines) and number > 1:
                notes.append(f"The last line of {path.name} was cut short and is left out.")
                continue
            raise _damaged(path, f"line {number} is not a JSON object with an iteration") from error
    return [rows[iteration] for iteration in sorted(rows)]


def _results(summaries: Iterable[tuple[Path, Any]]) -> Iterator[Result]:
    for path, summary in summaries:
        try:
            rows = summary["results"]
            summary["evaluation"]
            for row in rows:
                row["setting"].items()
                if "scores" in row:  # rows of datasets with several labels per image have none
                    row["role"], row["confusion_matrix"], row["per_class"]
                    yield Result(path, summary, row)
        except (KeyError, TypeError, AttributeError) as error:
            raise _damaged(path, f"{error} is missing or of another kind") from error


def _is_robustness(summary: Any) -> bool:
    return isinstance(summary, dict) and summary.get("evaluation") == "robustness"


def _robustness(path: Path, summary: dict[str, Any]) -> Robustness:
    try:
        summary["random_pair_cosine"], summary["samples"]
        for row in summary["perturbations"]:
            row["perturbation"], row["strength"], row["mean_cosine"], row["retrieval"]
        if summary["centers"] is not None:
            summary["centers"]["centers"], summary["centers"]["robustness_index"]
    except (KeyError, TypeError) as error:
        raise _damaged(path, f"{error} is missing or of another kind") from error
    return Robustness(path, summary)


def _find(folder: Path) -> list[Path]:
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [
            name for name in folders if name not in SKIPPED_FOLDERS and not name.startswith("before_")
        ]
        found += [Path(parent) / name for name in names if SUMMARY.fullmatch(name)]
    return sorted(found, key=_natural)


def _natural(path: Path) -> list[Any]:
    """Order ``training_999`` before ``training_1999``."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", str(path))]


def _config(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    try:
        content = yaml.safe_load(_text(path))
    except yaml.YAMLError as error:
        raise _damaged(path, "it is not YAML") from error
    return dict(_flat(content, "")) if isinstance(content, dict) else {}


def _flat(section: dict[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for name, value in section.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", "null" if value is None else str(value)


def _best(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    best = _json(path)
    if not isinstance(best, dict) or not isinstance(best.get("iteration"), int):
        raise _damaged(path, "it has no iteration")
    return best


def _pictures(folder: Path) -> list[Picture]:
    pictures = folder / "pictures"
    captions = _json(pictures / "captions.json") if (pictures / "captions.json").is_file() else {}
    if not isinstance(captions, dict):
        raise _damaged(pictures / "captions.json", "it is not a mapping of file name to caption")
    paths = sorted(pictures.glob("*.png"), key=_natural)
    return [Picture(path, str(captions.get(path.name, path.stem.replace("_", " ")))) for path in paths]


def _json(path: Path) -> Any:
    try:
        return json.loads(_text(path))
    except ValueError as error:
        raise _damaged(path, f"it is not JSON: {error}") from error


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeError) as error:
        raise _damaged(path, getattr(error, "strerror", None) or str(error)) from error


def _damaged(path: Path, why: str) -> DatasetError:
    return DatasetError(f'"{path}" cannot be read ({why}): repair or remove it')


def describe(runs: Sequence[Run]) -> str:
    """Say in a few words what was read."""
    parts = [
        counted(sum(len(run.training) for run in runs), "training row"),
        counted(sum(len(run.records) for run in runs), "monitor record"),
        counted(sum(len(run.results) + len(run.robustness) for run in runs), "result"),
        counted(sum(len(run.pictures) for run in runs), "picture"),
    ]
    return f"{counted(len(runs), 'run')}: {', '.join(parts)}"
