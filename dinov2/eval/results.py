"""Files that hold the results of an evaluation; docs/evaluation.md describes their contents."""

import logging
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dinov2 import distributed
from dinov2.errors import OutputError
from dinov2.eval.data import sample_names
from dinov2.eval.predictions import write_predictions
from dinov2.eval.scores import (
    DRAWS,
    LEVEL,
    SCORES,
    Predictions,
    bootstrap,
    confusion_matrix,
    interval,
    per_class_scores,
    score,
)
from dinov2.utils.strict_json import to_json

logger = logging.getLogger("dinov2")

SCHEMA_VERSION = 1
SEED = 0
# With more tries, their standard deviation says how much a result can be trusted.
MOST_TRIES = 10


class ResultTable:
    """The results of one evaluation, row by row, and the files they end in; only the main process writes.

    Args:
        evaluation: Its name in file names.
        output_dir: Where files go; None writes none.
        classes: Names of the classes; None numbers them.
        draws: Bootstrap draws behind each interval; 0 leaves the intervals out.
        save_predictions: Write a CSV file of predictions per row.
    """

    def __init__(
        self,
        evaluation: str,
        output_dir: str | None,
        *,
        classes: Sequence[str] | None = None,
        draws: int = DRAWS,
        save_predictions: bool = False,
    ) -> None:
        self.evaluation = evaluation
        self.output_dir = output_dir
        self.classes = None if classes is None else list(classes)
        self.draws = draws
        self.save_predictions = save_predictions and output_dir is not None
        self.rows: list[dict[str, Any]] = []

    def add(
        self,
        setting: Mapping[str, Any],
        accuracies: Mapping[str, float | list[float]],
        tries: Sequence[Predictions] = (),
        *,
        role: str = "val",
        dataset_str: str,
        dataset: Dataset,
        class_names: Sequence[str] | None = None,
    ) -> None:
        """Add a row.

        Args:
            setting: What tells this row from others, such as the number of neighbours.
            accuracies: In percent, as upstream's files have them.
            tries: Predictions, several where training samples were drawn several times; none where samples
                have several labels.
            role: What the dataset was used for: ``val`` or ``test``, ``test_2`` and so on.
            dataset_str, dataset: What was predicted.
            class_names: Its classes, where they are not those of the table.
        """
        row = {"setting": dict(setting), "role": role, "dataset": dataset_str, "samples": len(dataset)}
        row["accuracies_percent"] = dict(accuracies)
        if tries and distributed.is_main_process():
            row |= _scored(tries, self.draws)
            logger.info("%s: %s", ", ".join(map(str, setting.values())), _in_words(row))
            if self.save_predictions:
                row["predictions"] = self._write_predictions(row, tries, dataset, class_names)
        self.rows.append(row)

    def _write_predictions(
        self,
        row: Mapping[str, Any],
        tries: Sequence[Predictions],
        dataset: Dataset,
        class_names: Sequence[str] | None,
    ) -> list[str]:
        words = [self.evaluation, *row["setting"].values(), *([row["role"]] if row["role"] != "val" else [])]
        stem = "_".join(re.sub(r"[^0-9A-Za-z.+-]+", "-", str(word)) for word in words)
        names = [f"predictions_{stem}{f'_try_{n}' if len(tries) > 1 else ''}.csv" for n in range(len(tries))]
        classes = class_names or self.classes or range(tries[0].num_classes)
        samples = sample_names(dataset)
        for name, predictions in zip(names, tries, strict=True):
            write_predictions(Path(self.output_dir) / name, predictions, samples, [str(c) for c in classes])
        return names

    def write(self, head: Mapping[str, Any]) -> None:
        """Write ``results_eval_<evaluation>_summary.json`` with the entries ``head`` and the rows."""
        if self.output_dir is None:
            return
        summary = {
            "schema_version": SCHEMA_VERSION,
            **head,
            "classes": self.classes,
            "bootstrap": {"draws": self.draws, "level": LEVEL, "seed": SEED},
            "results": self.rows,
        }
        write_summary(self.output_dir, self.evaluation, summary)


def _scored(tries: Sequence[Predictions], draws: int) -> dict[str, Any]:
    """Return the scores of a row: means over tries, and the sum of their confusion matrices."""
    found = [score(predictions) for predictions in tries]
    stacked = {name: torch.tensor([scores[name] for scores in found]) for name in SCORES}
    row: dict[str, Any] = {
        "scores": {name: values.double().mean().item() for name, values in stacked.items()}
    }
    if len(tries) > 1:
        row["tries"] = len(tries)
        row["standard_deviations"] = {name: values.std().item() for name, values in stacked.items()}
    if draws and len(tries) <= MOST_TRIES:
        drawn = [bootstrap(predictions, draws, SEED) for predictions in tries]
        row["intervals"] = {
            name: interval(torch.stack([values[name] for values in drawn]).mean(dim=0)) for name in SCORES
        }
    classes = [per_class_scores(predictions) for predictions in tries]
    row["per_class"] = {
        name: torch.tensor([scores[name] for scores in classes], dtype=torch.float64).nanmean(dim=0).tolist()
        for name in classes[0]
    } | {"support": classes[0]["support"]}
    row["confusion_matrix"] = torch.stack([confusion_matrix(p) for p in tries]).sum(dim=0).tolist()
    return row


def _in_words(row: Mapping[str, Any]) -> str:
    texts = []
    for name in ("accuracy", "balanced_accuracy", "macro_f1", "auroc"):
        value = row["scores"][name]
        low, high = row.get("intervals", {}).get(name, (math.nan, math.nan))
        texts.append(
            f"{name.replace('_', ' ')} {value:.4f}" + (f" ({low:.4f}..{high:.4f})" if low == low else "")
        )
    return ", ".join(texts)


def percent(accuracy: Tensor) -> float | list[float]:
    """Return an accuracy, or a list of one per class, in percent."""
    return (100.0 * accuracy.double()).tolist()


def append_lines(path: str | Path, lines: list[str]) -> None:
    """Append lines to a result file; only the main process writes."""
    if not distributed.is_main_process():
        return
    try:
        with Path(path).open("a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)
    except OSError as error:
        raise _unwritable(path, error) from error


def write_summary(output_dir: str, evaluation: str, summary: Mapping[str, Any]) -> None:
    """Write ``results_eval_<evaluation>_summary.json``, one JSON document; only the main process writes.

    An earlier summary is replaced.
    """
    if not distributed.is_main_process():
        return
    path = Path(output_dir) / f"results_eval_{evaluation}_summary.json"
    text = to_json({"evaluation": evaluation, **summary}, indent=2)
    aside = path.with_suffix(".json.tmp")
    try:
        aside.write_text(text + "\n", encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        raise _unwritable(path, error) from error
    logger.info("results are in %s", path)


def _unwritable(path: str | Path, error: OSError) -> OutputError:
    return OutputError(
        f"the result file {path} cannot be written ({error.strerror}): choose another --output-dir"
    )
