"""Folds: which patients train, validate and test each of several models; kept by patient in a CSV file.

The place of a patient follows from the seed, the names and the classes, never from the order of a table.
"""

import csv
import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dinov2.data.datasets.csv_text import csv_lines
from dinov2.errors import ConfigError, DatasetError, OutputError
from dinov2.eval.slides.cohort import Cohort, Patient, Problems

PARTS = ("train", "val", "test")
COLUMNS = ("fold", "part", "patient")
# Of the patients that do not test: 60 % train, 20 % validate and 20 % test with five folds.
VALIDATION_SHARE = 0.25


@dataclass(frozen=True)
class Fold:
    """The names of the patients of each part of one fold, in order."""

    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]


def make_folds(cohort: Cohort, count: int, seed: int) -> list[Fold]:
    """Deal the patients of each class out to the folds that test them; a quarter of the others validates.

    Args:
        count: of folds, 2 or more; no class has fewer patients.
        seed: another one gives other folds.

    Raises:
        ConfigError: ``count`` is below 2.
    """
    if count < 2:
        raise ConfigError(f"the number of folds is {count}: give 2 or more")
    tested: list[list[Patient]] = [[] for _ in range(count)]
    dealt = 0
    for patients in _by_class(cohort.patients).values():
        for patient in _shuffled(patients, f"{seed} folds"):
            tested[dealt % count].append(patient)
            dealt += 1
    return [_with_validation(cohort, number, test, seed) for number, test in enumerate(tested)]


def _with_validation(cohort: Cohort, number: int, test: Sequence[Patient], seed: int) -> Fold:
    testing = {patient.name for patient in test}
    rest = [patient for patient in cohort.patients if patient.name not in testing]
    train, val = [], []
    for patients in _by_class(rest).values():
        # At least one of a class that has two validates, and at least one of each trains.
        taken = min(len(patients) - 1, max(1, round(VALIDATION_SHARE * len(patients))))
        shuffled = _shuffled(patients, f"{seed} validation {number}")
        val += shuffled[:taken]
        train += shuffled[taken:]
    return Fold(*(tuple(sorted(patient.name for patient in part)) for part in (train, val, test)))


def check_made(folds: Sequence[Fold], problems: Problems) -> None:
    """Note folds of :func:`make_folds` without a patient to validate: all classes are tiny then."""
    for number, fold in enumerate(folds):
        if not fold.val:
            problems.add(
                "folds in which no patient is left to validate (one class of 4 patients is enough: add some)",
                f"fold {number}",
            )


def _by_class(patients: Sequence[Patient]) -> dict[str, list[Patient]]:
    classes = defaultdict(list)
    for patient in patients:
        classes[patient.label].append(patient)
    return dict(sorted(classes.items()))


def _shuffled(patients: Sequence[Patient], salt: str) -> list[Patient]:
    return sorted(patients, key=lambda patient: hashlib.sha256(f"{salt} {patient.name}".encode()).digest())


def write_folds(path: str | Path, folds: Sequence[Fold]) -> None:
    """Write a CSV file with the columns fold, part and patient.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        with Path(path).open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            for number, fold in enumerate(folds):
                writer.writerows((number, part, name) for part in PARTS for name in getattr(fold, part))
    except OSError as error:
        raise OutputError(
            f"the folds {path} cannot be written ({error.strerror}): choose another --output-dir"
        ) from error


def read_folds(path: str | Path, cohort: Cohort, problems: Problems) -> list[Fold]:
    """Return the folds of a file of :func:`write_folds`.

    Args:
        problems: takes patients in two parts of a fold or tested in two folds, those that the file or the
            cohort lacks, and parts without patients or, at training, without a class.

    Raises:
        DatasetError: the file is missing or not of this kind.
    """
    parts: dict[int, dict[str, list[str]]] = defaultdict(lambda: {part: [] for part in PARTS})
    try:
        with csv_lines(path) as lines:
            reader = csv.DictReader(lines)
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise ValueError(f"its columns are {reader.fieldnames}")
            for row in reader:
                parts[int(row["fold"])][row["part"]].append(row["patient"])
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, DatasetError):
            raise
        raise DatasetError(
            f'the folds "{path}" cannot be read ({error}): give a CSV with the columns fold, part and '
            f"patient, whose parts are {', '.join(PARTS)}"
        ) from error
    labels = {patient.name: patient.label for patient in cohort.patients}
    _check_patients(parts, labels, problems)
    for number, fold in sorted(parts.items()):
        _check_fold(number, fold, labels, problems)
    return [Fold(*(tuple(sorted(fold[part])) for part in PARTS)) for _, fold in sorted(parts.items())]


def _check_patients(
    parts: Mapping[int, Mapping[str, Sequence[str]]], labels: Mapping[str, str], problems: Problems
) -> None:
    tested: dict[str, list[int]] = defaultdict(list)
    for number, fold in sorted(parts.items()):
        for name in fold["test"]:
            tested[name].append(number)
    for name, numbers in tested.items():
        if len(numbers) > 1:
            problems.add("patients tested in several folds", f"{name} ({', '.join(map(str, numbers))})")
    named = {name for fold in parts.values() for names in fold.values() for name in names}
    for name in sorted(named - set(labels)):
        problems.add("patients of the folds file that the labels do not name", name)
    for name in sorted(set(labels) - set(tested)):
        problems.add("patients that no fold of the folds file tests", name)


def _check_fold(
    number: int, fold: Mapping[str, Sequence[str]], labels: Mapping[str, str], problems: Problems
) -> None:
    parts_of = defaultdict(list)
    for part, names in fold.items():
        for name in names:
            parts_of[name].append(part)
    for name, own in parts_of.items():
        if len(own) > 1:
            problems.add("patients in several parts of a fold", f"{name} (fold {number}: {', '.join(own)})")
    for part, names in fold.items():
        if not names:
            problems.add("parts of folds without patients", f"{part} of fold {number}")
    missing = set(labels.values()) - {labels.get(name) for name in fold["train"]}
    for label in sorted(missing):
        problems.add("classes without a training patient", f"{label} in fold {number}")
