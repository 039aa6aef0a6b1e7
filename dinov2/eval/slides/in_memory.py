"""Scores of patients whose features are in memory: the cross-validation of a small slide set.

For a number that is wanted often and cheaply, such as in a training run; :mod:`dinov2.eval.slides.train` is
for the one that is reported. Letters: N tiles, D width, P patients, C classes.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from dinov2.eval.logistic import fit_logistic_regression
from dinov2.eval.slides.aggregators import recipe_of
from dinov2.eval.slides.cohort import Patient
from dinov2.eval.slides.fitting import (
    BagReading,
    FitOptions,
    fit,
    label_numbers,
    patient_logits,
    probabilities,
)
from dinov2.eval.slides.folds import Fold

MEAN, ABMIL = "mean", "abmil"
AGGREGATORS = (MEAN, ABMIL)
INVERSE_PENALTY = 1.0  # C of the logistic regression, scikit-learn's default for standardised features


@dataclass(frozen=True)
class HeldBags(BagReading):
    """Bags that are in memory, features (N, D) by the name of the slide; a path ends with that name."""

    held: Mapping[str, Tensor] = field(default_factory=dict)

    def features_of(self, path: Path) -> Tensor:
        """See the base class."""
        return self.held[path.name]


def out_of_fold_scores(
    held: Mapping[str, Tensor],
    patients: Sequence[Patient],
    classes: Sequence[str],
    folds: Sequence[Fold],
    aggregator: str = MEAN,
    *,
    seed: int = 0,
) -> Tensor:
    """Return the probabilities (P, C), float64, that models give patients whom they have not seen.

    Each patient is scored by the model of the fold that tests it. The same arguments give the same bits, and
    the random generators of the process stay as they are. It computes on the CPU.

    Args:
        held: finite features (N, D) of each slide, float32 on the CPU.
        patients: bags are paths that end with the name of the slide.
        classes: their names, in order; of two the second is the positive one.
        folds: each patient is tested in one of them.
        aggregator: ``mean``: logistic regression on the mean over the slides of the mean over the tiles,
            standardised, of the patients that train and validate. ``abmil``: that of
            :data:`~dinov2.eval.slides.aggregators.RECIPES`.
        seed: of the weights, dropout and order of ``abmil``; the number of the fold is added.
    """
    by_name = {patient.name: patient for patient in patients}
    place = {patient.name: row for row, patient in enumerate(patients)}
    found = torch.full((len(patients), len(classes)), torch.nan, dtype=torch.float64)
    for number, fold in enumerate(folds):
        train, val, test = ([by_name[name] for name in part] for part in (fold.train, fold.val, fold.test))
        if aggregator == MEAN:
            scores = _by_regression(held, [*train, *val], test, classes)
        else:
            scores = _by_attention(held, train, val, test, classes, aggregator, seed + number)
        found[[place[patient.name] for patient in test]] = scores
    return found


def _by_regression(
    held: Mapping[str, Tensor], train: Sequence[Patient], test: Sequence[Patient], classes: Sequence[str]
) -> Tensor:
    known, asked = (_means(held, patients) for patients in (train, test))
    mean, spread = known.mean(dim=0), known.std(dim=0, correction=0)
    # A feature that all share stays as it is.
    scale = torch.where(spread > torch.finfo(torch.float32).eps, spread, 1.0)
    known, asked = ((values - mean) / scale for values in (known, asked))
    labels = label_numbers(train, classes)
    fitted = fit_logistic_regression(known, labels, INVERSE_PENALTY, num_classes=len(classes))
    return fitted.predict_proba(asked)


def _means(held: Mapping[str, Tensor], patients: Sequence[Patient]) -> Tensor:
    """Return the mean over the slides of the mean over the tiles of each patient, float64 (P, D)."""
    of_slides = [
        torch.stack([held[path.name].double().mean(dim=0) for path in patient.bags]) for patient in patients
    ]
    return torch.stack([means.mean(dim=0) for means in of_slides])


def _by_attention(
    held: Mapping[str, Tensor],
    train: Sequence[Patient],
    val: Sequence[Patient],
    test: Sequence[Patient],
    classes: Sequence[str],
    aggregator: str,
    seed: int,
) -> Tensor:
    recipe, reading = recipe_of(aggregator), HeldBags(seed=seed, held=held)
    options = FitOptions(recipe.learning_rate, recipe.weight_decay, recipe.epochs, recipe.patience, seed=seed)
    width = next(iter(held.values())).shape[1]
    # The generators of devices are not touched, so they need not be kept.
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.default_generator.manual_seed(seed)
        model = recipe.build(width, 1 if len(classes) == 2 else len(classes))
        fit(model, train, val, classes, options, reading, level=logging.DEBUG)
        return probabilities(patient_logits(model, test, classes, reading))
