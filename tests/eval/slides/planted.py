"""Synthetic patients whose positive bags hold a few marked tiles."""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch


@dataclass(frozen=True)
class Planted:
    """What :func:`make` wrote: a folder of bags, a table of labels, and the marked tiles by slide."""

    bags: Path
    labels: Path
    marked: dict[str, np.ndarray]


def make(
    folder: Path,
    *,
    patients: int,
    tiles: int,
    width: int,
    share: float = 0.02,
    strength: float = 6.0,
    slides: int = 1,
    seed: int = 0,
    prefix: str = "P",
    shuffled: bool = False,
) -> Planted:
    """Write bags of standard normal features; every other patient is positive.

    In positive patients ``share`` of the tiles of each slide are moved by ``strength`` along one direction,
    which is the same for all seeds. ``shuffled`` gives the labels to other patients.
    """
    generator = np.random.default_rng(seed)
    direction = np.random.default_rng(12345).normal(size=width)
    direction *= strength / np.linalg.norm(direction)
    labels = [number % 2 for number in range(patients)]
    written = list(generator.permutation(labels)) if shuffled else labels
    bags, rows, marked = folder / "bags", [], {}
    bags.mkdir(parents=True)
    for number in range(patients):
        for slide in range(slides):
            name = f"{prefix}{number:03d}-{slide}"
            features = generator.normal(size=(tiles, width)).astype(np.float32)
            if labels[number]:
                chosen = generator.choice(tiles, max(1, round(share * tiles)), replace=False)
                features[chosen] += direction.astype(np.float32)
                marked[name] = chosen
            torch.save(torch.from_numpy(features), bags / f"{name}.pt")
            rows.append((f"{prefix}{number:03d}", name, ("no", "yes")[written[number]]))
    table = folder / "patients.csv"
    write_labels(table, rows)
    return Planted(bags, table, marked)


def write_labels(path: Path, rows, header=("patient", "slide", "msi")) -> None:
    """Write a table of labels."""
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
