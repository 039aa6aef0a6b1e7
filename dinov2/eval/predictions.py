"""Predictions of a whole dataset: collected from all processes, and kept as a CSV file.

Letters: S samples, C classes.
"""

import csv
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dinov2 import distributed
from dinov2.errors import DatasetError, OutputError, printable
from dinov2.eval.scores import Predictions

logger = logging.getLogger("dinov2")

# Before the scores, one column per class.
COLUMNS = ("index", "sample", "label", "predicted")


class PredictionCollector:
    """Keeps the class scores of this process's samples and puts those of all processes in order.

    Args:
        logits: The scores are logits, to be turned into probabilities; otherwise they are votes, scaled to
            sum to one. Both in float64, where different scores stay different.
    """

    def __init__(self, *, logits: bool) -> None:
        self.logits = logits
        self._parts: list[tuple[np.ndarray, ...]] = []

    def update(self, indices: Tensor, scores: Tensor, labels: Tensor) -> None:
        """Keep the scores (B, C) and labels (B,) of the samples ``indices`` (B,)."""
        self._parts.append(tuple(part.cpu().numpy() for part in (indices, scores, labels)))

    def gather(self) -> Predictions:
        """Return the predictions in the order of the dataset; all processes call this together.

        Raises:
            DatasetError: See :class:`~dinov2.eval.scores.Predictions`.
        """
        own = tuple(np.concatenate(parts) for parts in zip(*self._parts, strict=True))
        # A process without samples has no parts to say how many classes there are.
        gathered = [parts for parts in distributed.all_gather_objects(own) if parts]
        indices, scores, labels = (
            torch.from_numpy(np.concatenate(parts)) for parts in zip(*gathered, strict=True)
        )
        order = indices.argsort()
        scores = scores[order].double()
        scores = scores.softmax(dim=1) if self.logits else scores / scores.sum(dim=1, keepdim=True)
        return Predictions(labels[order].long(), scores)


def write_predictions(
    path: str | Path, predictions: Predictions, samples: Sequence[str], classes: Sequence[str]
) -> None:
    """Write a CSV file of one row per sample; only the main process writes.

    Args:
        samples: Where each sample lies, or what else tells it from others (S,).
        classes: Names of the classes (C,).

    Raises:
        OutputError: The file cannot be written.
    """
    if not distributed.is_main_process():
        return
    aside = Path(f"{path}.tmp")
    try:
        with aside.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([*COLUMNS, *(f"score {name}" for name in classes)])
            columns = (predictions.labels, predictions.predicted, predictions.scores)
            rows = zip(samples, *(column.tolist() for column in columns), strict=True)
            for index, (sample, label, predicted, scores) in enumerate(rows):
                writer.writerow([index, printable(sample), label, predicted, *map(repr, scores)])
        aside.replace(path)
    except OSError as error:
        raise OutputError(
            f"the predictions {path} cannot be written ({error.strerror}): choose another --output-dir"
        ) from error
    logger.info("predictions are in %s", path)


def read_predictions(path: str | Path) -> tuple[Predictions, list[str]]:
    """Return the predictions in a file of :func:`write_predictions`, and what it calls the samples.

    Raises:
        DatasetError: The file cannot be read, or is not of this kind.
    """
    try:
        with Path(path).open(encoding="utf-8", newline="") as file:
            header, *rows = csv.reader(file)
        if tuple(header[: len(COLUMNS)]) != COLUMNS:
            raise ValueError(f"its columns are {', '.join(header[:5])}")
        labels = torch.tensor([int(row[2]) for row in rows])
        scores = torch.tensor([[float(x) for x in row[len(COLUMNS) :]] for row in rows], dtype=torch.float64)
    except (OSError, ValueError, IndexError) as error:
        raise DatasetError(
            f'the predictions "{path}" cannot be read ({error}): give a file that an evaluation wrote with '
            "--predictions"
        ) from error
    return Predictions(labels, scores), [row[1] for row in rows]
