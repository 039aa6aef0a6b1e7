"""Slide evaluation: train an aggregator on bags of tiles in patient-level folds, and score patients.

    python -m dinov2.eval.slides.train --bags DIR --labels patients.csv --target msi --output-dir OUT

docs/slide_protocol.md describes the tables, the protocol and the files.
"""

import argparse
import logging
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov2 import cli, distributed
from dinov2.errors import ConfigError, OutputError
from dinov2.eval.cli import check_draws
from dinov2.eval.results import SEED, ResultTable
from dinov2.eval.scores import DRAWS, Predictions, interval
from dinov2.eval.slides.aggregators import RECIPES, recipe_of
from dinov2.eval.slides.cohort import (
    PATIENT,
    SLIDE,
    Cohort,
    Columns,
    Patient,
    Problems,
    check_classes,
    check_external,
    in_class_order,
    read_cohort,
)
from dinov2.eval.slides.fitting import (
    JOINED,
    SELECT_BY,
    SLIDES,
    BagReading,
    FitOptions,
    check_options,
    fit,
    label_numbers,
    patient_logits,
    probabilities,
)
from dinov2.eval.slides.folds import Fold, check_made, make_folds, read_folds, write_folds
from dinov2.eval.slides.models import save_model
from dinov2.eval.slides.precision import average_precision, bootstrap_average_precision
from dinov2.utils.config import default_setup
from dinov2.utils.device import resolve_device
from dinov2.utils.utils import fix_random_seeds

logger = logging.getLogger("dinov2")

EVALUATION = "slides"
FOLDS_FILE = "folds.csv"
SUMMED_UP = ("auroc", "auprc", "balanced_accuracy", "macro_f1", "accuracy")
# Slides at 10x rarely have more tiles.
MAX_TILES = 32_768


@dataclass(frozen=True)
class Study:
    """What is trained and tested: patients, classes in order, and folds."""

    cohort: Cohort
    external: Cohort | None
    classes: list[str]
    folds: list[Fold]


class _Patients:
    """Patients as a dataset that results can name."""

    def __init__(self, patients: Sequence[Patient]) -> None:
        self.patients = patients

    def __len__(self) -> int:
        return len(self.patients)

    def get_image_path(self, index: int) -> str:
        """Return the name of a patient."""
        return self.patients[index].name


def get_args_parser(add_help: bool = True) -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = argparse.ArgumentParser(
        description="Patient-level evaluation of tile features on slides", add_help=add_help
    )
    parser.add_argument("--bags", required=True, help="Folder of bags, see dinov2.eval.slides.extract")
    parser.add_argument("--labels", required=True, help="CSV with a line per slide: patient, slide, target")
    parser.add_argument("--target", required=True, help="Column of the classes")
    parser.add_argument("--patient-column", default=PATIENT, help="(default: %(default)s)")
    parser.add_argument("--slide-column", default=SLIDE, help="(default: %(default)s)")
    parser.add_argument("--positive", help="The positive one of two classes (default: the last by alphabet)")
    parser.add_argument("--external-bags", help="Folder of bags of an external cohort")
    parser.add_argument("--external-labels", help="CSV of its labels, with the same columns")
    parser.add_argument("--output-dir", required=True, help="Folder for results, models and logs")
    parser.add_argument("--folds", type=int, default=5, help="Number of folds (default: %(default)s)")
    parser.add_argument("--folds-file", help="Take the folds of this CSV, such as folds.csv of another run")
    parser.add_argument("--aggregator", default="abmil", help=f"{', '.join(RECIPES)} (default: %(default)s)")
    parser.add_argument("--epochs", type=int, help="The most epochs (default: the aggregator's)")
    parser.add_argument("--patience", type=int, help="Epochs without gain (default: the aggregator's)")
    parser.add_argument("--learning-rate", type=float, help="(default: the aggregator's)")
    parser.add_argument("--weight-decay", type=float, help="(default: the aggregator's)")
    parser.add_argument(
        "--select-by", choices=SELECT_BY, default="loss", help="Validation value (default: %(default)s)"
    )
    parser.add_argument(
        "--patient-bag",
        choices=(SLIDES, JOINED),
        default=SLIDES,
        help="A bag per slide and the mean of their logits, or all slides of a patient in one bag (default: "
        "%(default)s)",
    )
    parser.add_argument(
        "--max-tiles",
        type=int,
        default=MAX_TILES,
        help="Larger bags are thinned out to so many tiles at training, 0 for never (default: %(default)s)",
    )
    parser.add_argument("--half", action="store_true", help="Hand features on as float16, half the memory")
    parser.add_argument("--workers", type=int, default=0, help="Processes that read bags (default: 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="Of folds and training (default: %(default)s)")
    parser.add_argument(
        "--bootstrap-draws", type=int, default=DRAWS, help="Behind the intervals (default: %(default)s)"
    )
    return parser


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Check, train, score and write; returns the means over folds by score, see :func:`over_folds`."""
    check_draws(args.bootstrap_draws)
    recipe = recipe_of(args.aggregator)
    if (args.external_bags is None) != (args.external_labels is None):
        raise ConfigError("an external cohort needs both --external-bags and --external-labels")
    given = {
        name: getattr(recipe, name) if getattr(args, name) is None else getattr(args, name)
        for name in ("learning_rate", "weight_decay", "epochs", "patience")
    }
    options = FitOptions(**given, select_by=args.select_by, max_tiles=args.max_tiles, seed=args.seed)
    reading = BagReading(args.patient_bag, args.half, args.workers, args.seed)
    check_options(options, reading)
    study = open_study(args)
    try:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f'the folder "{args.output_dir}" cannot be made ({error.strerror}): choose another --output-dir'
        ) from error
    default_setup(args, seed=args.seed, device=args.device)
    if distributed.get_global_size() > 1:
        raise ConfigError("training on slides takes one process: start it without torchrun")
    write_folds(Path(args.output_dir, FOLDS_FILE), study.folds)
    return run_study(study, args.aggregator, options, reading, args)


def open_study(args: argparse.Namespace) -> Study:
    """Read and check tables, bags and folds.

    Raises:
        DatasetError: something is wrong with them; all of it is in the message.
    """
    columns = Columns(args.target, args.patient_column, args.slide_column)
    problems = Problems()
    cohort = read_cohort(args.labels, args.bags, columns, problems)
    external = None
    if args.external_bags is not None:
        external = read_cohort(args.external_labels, args.external_bags, columns, problems)
        check_external(cohort, external, problems)
    if args.folds_file is None:
        check_classes(cohort, args.folds, problems)
    else:
        check_classes(cohort, 0, problems)
        folds = read_folds(args.folds_file, cohort, problems)
    problems.stop()
    if args.folds_file is None:
        folds = make_folds(cohort, args.folds, args.seed)
        check_made(folds, problems)
        problems.stop()
    return Study(cohort, external, in_class_order(cohort.classes(), args.positive), folds)


def run_study(
    study: Study, aggregator: str, options: FitOptions, reading: BagReading, args: argparse.Namespace
) -> dict[str, Any]:
    """Train a model per fold, score the cohorts, and write models, predictions and the summary."""
    table = ResultTable(
        EVALUATION,
        args.output_dir,
        classes=study.classes,
        draws=args.bootstrap_draws,
        save_predictions=True,
    )
    by_name = {patient.name: patient for patient in study.cohort.patients}
    device = resolve_device(args.device)
    pooled: list[tuple[Patient, Tensor]] = []
    external: list[Tensor] = []
    trained = []
    for number, fold in enumerate(study.folds):
        seed = options.seed + number
        fix_random_seeds(seed)
        outputs = 1 if len(study.classes) == 2 else len(study.classes)
        model = recipe_of(aggregator).build(study.cohort.width, outputs).to(device)
        train, val, test = ([by_name[name] for name in part] for part in (fold.train, fold.val, fold.test))
        logger.info("fold %d: %d patients train, %d validate, %d test", number, *map(len, (train, val, test)))
        fitted = fit(model, train, val, study.classes, replace(options, seed=seed), reading)
        trained.append({"fold": number, "seed": seed, **asdict(fitted)})
        save_model(
            Path(args.output_dir, f"model_fold_{number}.pt"),
            model,
            aggregator,
            study.cohort.width,
            study.classes,
            args.target,
            study.cohort.encoder,
        )
        found = probabilities(patient_logits(model, test, study.classes, reading))
        pooled += zip(test, found, strict=True)
        _add(table, {"fold": f"fold {number}"}, test, [found], study.classes, "val", args.labels)
        if study.external is not None:
            logits = patient_logits(model, study.external.patients, study.classes, reading)
            external.append(probabilities(logits))
    over = {"val": over_folds(table.rows)}
    pooled.sort(key=lambda item: item[0].name)
    everyone = [patient for patient, _ in pooled]
    scores = torch.stack([row for _, row in pooled])
    _add(table, {"fold": "pooled"}, everyone, [scores], study.classes, "val", args.labels)
    if study.external is not None:
        over["test"] = _score_external(table, study, external, args.external_labels)
    table.write(_head(study, aggregator, options, reading, args, trained, over))
    return over


def _score_external(
    table: ResultTable, study: Study, found: Sequence[Tensor], labels: str
) -> dict[str, dict[str, float]]:
    patients = study.external.patients
    first = len(table.rows)
    for number, scores in enumerate(found):
        _add(table, {"fold": f"fold {number}"}, patients, [scores], study.classes, "test", labels)
    over = over_folds(table.rows[first:])
    mean = torch.stack(list(found)).mean(dim=0)
    _add(table, {"fold": "ensemble"}, patients, [mean], study.classes, "test", labels)
    return over


def _add(
    table: ResultTable,
    setting: dict[str, str],
    patients: Sequence[Patient],
    scores: Sequence[Tensor],
    classes: Sequence[str],
    role: str,
    labels: str,
) -> None:
    """Add a row to the table of results, with the average precision and its share of positives."""
    numbers = label_numbers(patients, classes)
    predictions = [Predictions(numbers, part) for part in scores]
    right = (predictions[0].predicted == numbers).double().mean()
    table.add(
        setting,
        {"top-1": 100 * right.item()},
        predictions,
        role=role,
        dataset_str=labels,
        dataset=_Patients(patients),
    )
    row = table.rows[-1]
    row["scores"]["auprc"] = average_precision(predictions[0])
    if "intervals" in row:
        drawn = bootstrap_average_precision(predictions[0], table.draws, SEED)
        row["intervals"]["auprc"] = interval(drawn)
    row["prevalence"] = (numbers == len(classes) - 1).double().mean().item() if len(classes) == 2 else None


def over_folds(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return by score the mean and the standard deviation (n - 1) over the folds in which it is defined."""
    found = {}
    for name in SUMMED_UP:
        values = [row["scores"][name] for row in rows if row["scores"][name] == row["scores"][name]]
        found[name] = {
            "mean": statistics.fmean(values) if values else float("nan"),
            "standard_deviation": statistics.stdev(values) if len(values) > 1 else float("nan"),
            "folds": len(values),
        }
    return found


def _head(
    study: Study,
    aggregator: str,
    options: FitOptions,
    reading: BagReading,
    args: argparse.Namespace,
    trained: list[dict[str, Any]],
    over: dict[str, Any],
) -> dict[str, Any]:
    return {
        "target": args.target,
        "aggregator": aggregator,
        "feature_width": study.cohort.width,
        "encoder": study.cohort.encoder,
        "patients": len(study.cohort.patients),
        "slides": sum(len(patient.bags) for patient in study.cohort.patients),
        "bags": args.bags,
        "labels": args.labels,
        "external_bags": args.external_bags,
        "external_labels": args.external_labels,
        "folds_file": args.folds_file or FOLDS_FILE,
        "options": {**asdict(options), **asdict(reading)},
        "over_folds": over,
        "training": trained,
    }


if __name__ == "__main__":
    cli.run(main, get_args_parser().parse_args(sys.argv[1:]))
