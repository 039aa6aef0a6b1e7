"""Patients scored by cross-validation on features in memory."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from dinov2.eval.scores import Predictions, score
from dinov2.eval.slides.cohort import Cohort, Patient
from dinov2.eval.slides.folds import make_folds
from dinov2.eval.slides.in_memory import out_of_fold_scores


def planted(patients, shift):
    """Features of two slides of each patient; those of every other patient are moved along one direction."""
    generator = torch.Generator().manual_seed(0)
    direction = torch.nn.functional.normalize(torch.randn(8, generator=generator), dim=0)
    held = {
        f"s{number}-{slide}": torch.randn(12, 8, generator=generator) + (number % 2) * shift * direction
        for number in range(patients)
        for slide in range(2)
    }
    known = tuple(
        Patient(f"p{n:02d}", "ab"[n % 2], (Path(f"s{n}-0"), Path(f"s{n}-1"))) for n in range(patients)
    )
    return held, known, make_folds(Cohort(known, 8), 4, seed=0)


def auroc(scores):
    return score(Predictions(torch.arange(len(scores)) % 2, scores))["auroc"]


BOTH = ["mean", pytest.param("abmil", marks=pytest.mark.slow)]


@pytest.mark.parametrize("aggregator", BOTH)
def test_a_signal_is_found_and_noise_is_not(aggregator):
    held, patients, folds = planted(24, 1.5)
    found = out_of_fold_scores(held, patients, ["a", "b"], folds, aggregator)
    assert found.shape == (24, 2) and auroc(found) > 0.9
    assert torch.allclose(found.sum(dim=1), torch.ones(24, dtype=torch.float64))
    held, patients, folds = planted(24, 0)
    assert 0.2 < auroc(out_of_fold_scores(held, patients, ["a", "b"], folds, aggregator)) < 0.8


@pytest.mark.parametrize("aggregator", BOTH)
def test_scores_repeat_and_leave_random_numbers_and_the_mode_of_gradients_alone(aggregator):
    held, patients, folds = planted(16, 1.0)
    first = out_of_fold_scores(held, patients, ["a", "b"], folds, aggregator)
    torch.manual_seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    with torch.no_grad():  # as within an evaluation
        again = out_of_fold_scores(held, patients, ["a", "b"], folds, aggregator)
        assert not torch.is_grad_enabled()
    assert torch.equal(first, again)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])


def test_mean_pooling_is_scikit_learns_regression_on_patients_that_do_not_test():
    held, patients, folds = planted(16, 1.0)
    found = out_of_fold_scores(held, patients, ["a", "b"], folds)
    pooled = np.stack(
        [np.mean([held[path.name].mean(dim=0).numpy() for path in p.bags], axis=0) for p in patients]
    ).astype(np.float64)
    for fold in folds:
        test = np.array([patient.name in fold.test for patient in patients])
        mean, spread = pooled[~test].mean(axis=0), pooled[~test].std(axis=0)
        scaled, labels = (pooled - mean) / spread, np.arange(16) % 2
        expected = LogisticRegression(C=1.0, tol=1e-10).fit(scaled[~test], labels[~test])
        np.testing.assert_allclose(
            found[torch.from_numpy(test)].numpy(), expected.predict_proba(scaled[test]), atol=1e-4
        )


@pytest.mark.parametrize("aggregator", BOTH)
def test_three_classes_and_features_that_all_share(aggregator):
    held, patients, _ = planted(18, 0)
    patients = tuple(
        Patient(patient.name, "abc"[number % 3], patient.bags) for number, patient in enumerate(patients)
    )
    for features in held.values():
        features[:, 0] = 3.0
    folds = make_folds(Cohort(patients, 8), 3, seed=0)
    found = out_of_fold_scores(held, patients, ["a", "b", "c"], folds, aggregator)
    assert found.shape == (18, 3) and found.isfinite().all()
