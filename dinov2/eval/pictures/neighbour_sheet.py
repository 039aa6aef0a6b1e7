"""Tiles beside the training tiles that are most like them, and tiles that are taken for something else."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from torch import Tensor
from torch.nn import functional

from dinov2.eval.neighbor_search import find_neighbors
from dinov2.eval.neighbors import vote
from dinov2.eval.pictures.canvas import RIGHT, WRONG, Cell, sheet

SHOWN, VOTERS, TEMPERATURE = 8, 20, 0.07
SIDE = 112
MOST_ERRORS = 8


@dataclass(frozen=True)
class Neighbours:
    """The training tiles most like each query, and what they vote for.

    Args:
        labels: Of the queries (Q,).
        rows, similarities, neighbour_labels: Of the nearest training tiles (Q, K), nearest first.
        predicted, confidence: The class of the vote (Q,) and its share of all votes, 0..1.
    """

    labels: np.ndarray
    rows: np.ndarray
    similarities: np.ndarray
    neighbour_labels: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray


def neighbours(stored: Tensor, stored_labels: Tensor, queries: Tensor, labels: Tensor) -> Neighbours:
    """Find the neighbours of features (Q, D) among training features (S, D), any scale."""
    k = min(VOTERS, len(stored))
    unit, asked = (functional.normalize(part.float(), dim=1) for part in (stored, queries))
    similarities, rows = find_neighbors(unit, asked, k)
    classes = int(max(stored_labels.max(), labels.max())) + 1
    votes = vote(similarities, stored_labels[rows], [k], TEMPERATURE, classes)[k]
    confidence, predicted = votes.max(dim=1)
    parts = (labels, rows, similarities, stored_labels[rows], predicted, confidence)
    return Neighbours(*(part.cpu().numpy() for part in parts))


def one_per_class(labels: np.ndarray, seed: int) -> list[int]:
    """Return one sample of each class, drawn with a seed."""
    generator = np.random.default_rng(seed)
    return [int(generator.choice(np.flatnonzero(labels == label))) for label in np.unique(labels)]


def hardest_errors(found: Neighbours, most: int = MOST_ERRORS) -> list[int]:
    """Return the queries that most votes take for another class, the most confident first."""
    wrong = np.flatnonzero(found.predicted != found.labels)
    return wrong[np.argsort(-found.confidence[wrong], kind="stable")][:most].tolist()


def neighbour_sheet(
    chosen: Sequence[int],
    found: Neighbours,
    classes: Sequence[str],
    query: Callable[[int], Image.Image],
    stored: Callable[[int], Image.Image],
    title: str,
    samples: Sequence[int],
) -> tuple[Image.Image, list[dict]]:
    """Draw a row per chosen query: the tile, then its nearest training tiles, framed green or red.

    Args:
        chosen: Queries, by row of ``found``.
        classes: Names of the classes.
        query, stored: Return the picture of a query and of a training tile.
        samples: Number of each query in its dataset (Q,), which the sheet and the numbers name.

    Returns:
        The sheet, and a row of numbers per query and neighbour.
    """
    rows, names, numbers = [], [], []
    for index in chosen:
        own, predicted = int(found.labels[index]), int(found.predicted[index])
        share = f"{classes[predicted]} with {found.confidence[index]:.0%} of the votes"
        names.append(f"{classes[own]}: image {samples[index]}, taken for {share}")
        cells = [Cell(query(index), [classes[own], "query"])]
        for rank in range(min(SHOWN, found.rows.shape[1])):
            row, label = int(found.rows[index, rank]), int(found.neighbour_labels[index, rank])
            similarity = float(found.similarities[index, rank])
            lines = [classes[label], f"{similarity:.3f}"]
            cells.append(Cell(stored(row), lines, RIGHT if label == own else WRONG))
            numbers.append(
                {
                    "query": samples[index],
                    "class": classes[own],
                    "predicted": classes[predicted],
                    "confidence": float(found.confidence[index]),
                    "rank": rank + 1,
                    "neighbour": row,
                    "neighbour_class": classes[label],
                    "similarity": similarity,
                }
            )
        rows.append(cells)
    return sheet(rows, SIDE, title, names), numbers


def hit_rate(found: Neighbours) -> float:
    """Return the share of queries whose nearest training tile has their class."""
    return float((found.neighbour_labels[:, 0] == found.labels).mean())
