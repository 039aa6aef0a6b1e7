"""Cohorts: the patients of a table of labels, and the bags of their slides.

What is wrong with the tables and bags is gathered, so that all of it is said before training starts.
"""

import csv
from collections import defaultdict
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path

from dinov2.data.datasets.csv_text import csv_lines
from dinov2.data.slides.sources import FOUND_SUFFIXES
from dinov2.errors import ConfigError, DatasetError, nearest, some_of
from dinov2.eval.slides.bags import HDF5_SUFFIXES, TORCH_SUFFIX, find_bags, look_at_bag

PATIENT, SLIDE = "patient", "slide"
# What may follow the name of a slide in a table: of slides, of some that we do not read, and of bags.
SUFFIXES = (*FOUND_SUFFIXES, ".czi", ".isyntax", *HDF5_SUFFIXES, TORCH_SUFFIX)
# More of one kind are counted, not named.
SHOWN = 20


@dataclass(frozen=True)
class Columns:
    """What the columns of a table of labels are called."""

    target: str
    patient: str = PATIENT
    slide: str = SLIDE


@dataclass(frozen=True)
class Patient:
    """A patient with the bags of all slides.

    Attributes:
        name: what the table calls the patient.
        label: the class, as written.
        bags: files of features, one per slide, in the order of the slides' names.
    """

    name: str
    label: str
    bags: tuple[Path, ...]


@dataclass(frozen=True)
class Cohort:
    """Patients in the order of their names, and what made the features of their tiles.

    Attributes:
        patients: in that order.
        width: D of the features.
        encoder: see :func:`~dinov2.eval.slides.bags.encoder_of`, empty where no bag says it.
    """

    patients: tuple[Patient, ...]
    width: int
    encoder: str = ""

    def classes(self) -> list[str]:
        """Return the labels that occur, in the order of the alphabet."""
        return sorted({patient.label for patient in self.patients})


class Problems:
    """Gathers what is wrong, by kind; :meth:`stop` says all of it in one error."""

    def __init__(self) -> None:
        self._items: dict[str, list[str]] = defaultdict(list)

    def add(self, kind: str, item: str) -> None:
        """Note a case of ``kind``, the start of a sentence that ends with the cases."""
        self._items[kind].append(item)

    def __bool__(self) -> bool:
        return bool(self._items)

    def stop(self) -> None:
        """Raise an error if anything was noted.

        Raises:
            DatasetError: with a line for each kind.
        """
        if self._items:
            lines = [
                f"- {kind}: {some_of(items, SHOWN, separator='; ')}" for kind, items in self._items.items()
            ]
            raise DatasetError("the patients cannot be used as they are:\n" + "\n".join(lines))


@dataclass(frozen=True)
class Listed:
    """A patient of a table of labels: name, class, and the names of the slides that were found, in order."""

    name: str
    label: str
    slides: tuple[str, ...]


@dataclass(frozen=True)
class Material:
    """What the slides of a table are looked for in.

    Attributes:
        names: of the slides that are there.
        kind: what each is there, in a sentence: ``bag`` or ``file``.
        source: where they are, as the user named it.
        remedy: what to do about one that is missing.
    """

    names: Container[str]
    kind: str
    source: str
    remedy: str


def read_cohort(labels: str | Path, bags: str | Path, columns: Columns, problems: Problems) -> Cohort:
    """Return the patients of a table of labels with the bags of their slides.

    Bags that the table does not name are left out.

    Args:
        labels: the CSV, see :func:`read_patients`.
        bags: the folder, see :func:`~dinov2.eval.slides.bags.find_bags`.
        columns: the names of the columns.
        problems: takes what is wrong with patients, labels and bags; the cohort is of use if that is nothing.

    Raises:
        DatasetError: the table cannot be read or lacks a column, or there is no bag at all.
    """
    rows = _read_rows(Path(labels), columns)
    found = find_bags(bags)
    material = Material(found, "bag", str(bags), "extract them, or delete their lines")
    patients = tuple(
        Patient(listed.name, listed.label, tuple(found[slide] for slide in listed.slides))
        for listed in _patients_of(rows, labels, columns, material, problems)
    )
    return Cohort(patients, *_common_facts([path for patient in patients for path in patient.bags], problems))


def read_patients(
    labels: str | Path, columns: Columns, material: Material, problems: Problems
) -> list[Listed]:
    """Return the patients of a table of labels, in the order of their names.

    The table is a CSV with a line for each slide: columns for the patient, the slide and the target. A slide
    is named as its file, with or without one of ``SUFFIXES``.

    Args:
        labels: the CSV.
        columns: the names of the columns.
        material: the slides that are there.
        problems: takes what is wrong with patients, labels and slides; the patients are of use if that is
            nothing.

    Raises:
        DatasetError: the table cannot be read, lacks a column or names no patient.
    """
    return _patients_of(_read_rows(Path(labels), columns), labels, columns, material, problems)


def _patients_of(
    rows: Sequence[tuple[int, tuple[str, str, str]]],
    labels: str | Path,
    columns: Columns,
    material: Material,
    problems: Problems,
) -> list[Listed]:
    labels_of, slides_of, patients_of = defaultdict(set), defaultdict(set), defaultdict(set)
    written_of = defaultdict(set)
    for line, (patient, slide, label) in rows:
        if not patient or not slide:
            problems.add(f'lines of "{labels}" without a patient or slide', f"line {line}")
            continue
        if not label:
            problems.add(
                f'slides without a label below "{columns.target}" in "{labels}" (fill in or delete the line)',
                f"{slide} of patient {patient} (line {line})",
            )
            continue
        name = slide if slide in material.names else _without_suffix(slide)
        if name not in material.names:
            problems.add(
                f'slides without a {material.kind} in "{material.source}" ({material.remedy})',
                f"{slide} of patient {patient}",
            )
        labels_of[patient].add(label)
        slides_of[patient].add(name)
        patients_of[name].add(patient)
        written_of[name].add(slide)
    for slide, patients in patients_of.items():
        if len(patients) > 1:
            problems.add("slides of several patients", f"{slide} of {', '.join(sorted(patients))}")
    for slide, names in written_of.items():
        if len(names) > 1:
            problems.add(
                f'slides of "{labels}" that share a {material.kind} (give each its own, or name the slide '
                "once)",
                f"{', '.join(sorted(names))} ({material.kind} {slide})",
            )
    for patient, values in labels_of.items():
        if len(values) > 1:
            problems.add("patients with contradictory labels", f"{patient} ({', '.join(sorted(values))})")
    patients = [
        Listed(
            name, min(values), tuple(slide for slide in sorted(slides_of[name]) if slide in material.names)
        )
        for name, values in sorted(labels_of.items())
    ]
    if not patients and not problems:
        raise DatasetError(f'"{labels}" names no patient: give a line for each slide below the header')
    return patients


def check_classes(cohort: Cohort, folds: int, problems: Problems, option: str = "--folds") -> None:
    """Note a cohort of one class, and classes too small for so many folds, which ``option`` sets."""
    classes = cohort.classes()
    if len(classes) == 1:
        problems.add("all patients are of one class, and two are needed", classes[0])
    for name in classes:
        count = sum(patient.label == name for patient in cohort.patients)
        if count < folds:
            problems.add(
                f"classes with fewer patients than the {folds} folds (lower {option})",
                f"{name} ({count})",
            )


def check_external(cohort: Cohort, external: Cohort, problems: Problems) -> None:
    """Note what keeps a cohort from being a test of models that were trained on another."""
    own = {patient.name for patient in cohort.patients}
    own_slides = {path.stem for patient in cohort.patients for path in patient.bags}
    own_files = {path.resolve() for patient in cohort.patients for path in patient.bags}
    for patient in external.patients:
        for path in patient.bags:
            if path.stem in own_slides or path.resolve() in own_files:
                problems.add(
                    "slides of both cohorts (by name or by file; leave them out of one)",
                    f"{path.stem} of external patient {patient.name}",
                )
        if patient.name in own:
            problems.add("patients of both cohorts", patient.name)
        if patient.label not in cohort.classes():
            problems.add(
                f"external patients of classes that are not trained ({', '.join(cohort.classes())})",
                f"{patient.name} ({patient.label})",
            )
    if cohort.width and external.width and cohort.width != external.width:
        problems.add("the cohorts have features of two widths", f"{cohort.width} and {external.width}")
    if cohort.encoder and external.encoder and cohort.encoder != external.encoder:
        problems.add("the cohorts have features of two encoders", f"{cohort.encoder} and {external.encoder}")


def in_class_order(classes: Sequence[str], positive: str | None) -> list[str]:
    """Return the classes with the positive one, of two, in the last place.

    Args:
        classes: in the order of the alphabet.
        positive: None keeps that order, in which ``1``, ``pos`` and ``yes`` come last.

    Raises:
        ConfigError: there is no such class, or there are more than two.
    """
    if positive is None:
        return list(classes)
    if positive not in classes or len(classes) != 2:
        raise ConfigError(
            f'the positive class is "{positive}", the classes are {", ".join(classes)}: name one of two'
        )
    return [name for name in classes if name != positive] + [positive]


def _common_facts(paths: Sequence[Path], problems: Problems) -> tuple[int, str]:
    """Return the width and the encoder that most bags have, 0 and empty without any; others are noted."""
    of_width: dict[int, list[Path]] = defaultdict(list)
    of_encoder: dict[str, list[Path]] = defaultdict(list)
    for path in paths:
        try:
            facts = look_at_bag(path)
        except DatasetError as error:
            problems.add("bags that cannot be read", str(error))
            continue
        of_width[facts.width].append(path)
        if facts.encoder:
            of_encoder[facts.encoder].append(path)
    width = max(of_width, key=lambda width: len(of_width[width]), default=0)
    encoder = max(of_encoder, key=lambda encoder: len(of_encoder[encoder]), default="")
    for other in sorted(set(of_width) - {width}):
        for path in of_width[other]:
            problems.add(f"bags of another width than the {width} of most", f"{path.stem} ({other})")
    for other in sorted(set(of_encoder) - {encoder}):
        for path in of_encoder[other]:
            problems.add(f"bags of another encoder than the {encoder} of most", f"{path.stem} ({other})")
    return width, encoder


def _without_suffix(slide: str) -> str:
    """Return the name of a slide; a dot within it, as in ``S1.2``, starts no suffix."""
    path = Path(slide)
    return path.stem if path.suffix.lower() in SUFFIXES else path.name


def _read_rows(path: Path, columns: Columns) -> list[tuple[int, tuple[str, str, str]]]:
    """Return the number of each line with its patient, slide and label."""
    if not path.is_file():
        raise DatasetError(
            f'the table of labels "{path}" is missing: give a CSV with columns for patient, slide and target'
        )
    wanted = (columns.patient, columns.slide, columns.target)
    with csv_lines(path) as lines:
        reader = csv.DictReader(lines, skipinitialspace=True, restval="")
        names = [name.strip() for name in reader.fieldnames or ()]
        for name in wanted:
            if name not in names:
                listed = f"only {', '.join(names)}" if names else "it is empty"
                separated = next((mark for mark in ";\t" if len(names) == 1 and mark in names[0]), "")
                advice = (
                    f"separate columns by commas, not by {'tabs' if separated == chr(9) else separated}"
                    if separated
                    else "give --target, --patient-column and --slide-column as the header has them"
                )
                raise DatasetError(
                    f'"{path}" has no column "{name}"{nearest(name, names)}, {listed}: {advice}'
                )
        reader.fieldnames = names
        return [(reader.line_num, tuple(row[name].strip() for name in wanted)) for row in reader]
