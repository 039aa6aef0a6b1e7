"""A small slide set: pyramidal TIFFs cut from the real slide, darker where the patient is positive."""

import csv
from pathlib import Path

import numpy as np
import tifffile

from tests.data.slides.conftest import SVS, write_tiff

SIDE = 560
HEADER = ("patient", "slide", "msi")


def make(folder: Path, patients: int, *, contrast: float = 0.75) -> list[str]:
    """Write slides and ``patients.csv`` into a folder; return the overrides of a run that scores them.

    Patients are ``no`` and ``yes`` by turns; the last one has two slides.
    """
    with tifffile.TiffFile(SVS) as file:
        level0 = file.pages[0].asarray()
    folder.mkdir(parents=True)
    rows = []
    for number in range(patients + 1):
        patient = min(number, patients - 1)
        left, top = 760 + 110 * (number % 5), 700 + 420 * (number // 5)  # within the tissue
        cut = level0[top : top + SIDE, left : left + SIDE]
        positive = patient % 2
        cut = (cut * contrast).astype(np.uint8) if positive else cut
        write_tiff(folder / f"S{number:02d}.tiff", cut, levels=(1, 2), compression="deflate")
        rows.append((f"P{patient:02d}", f"S{number:02d}", ("no", "yes")[positive]))
    write_table(folder / "patients.csv", rows)
    return overrides(folder)


def write_table(path: Path, rows) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([HEADER, *rows])


def overrides(folder: Path) -> list[str]:
    return [
        f"evaluation.slides.path={folder}",
        f"evaluation.slides.labels={folder / 'patients.csv'}",
        "evaluation.slides.target=msi",
        "evaluation.slides.max_tiles=6",
        "evaluation.slides.folds=3",
    ]
