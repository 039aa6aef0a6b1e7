"""Scores and their intervals against scikit-learn, and what happens where it and others disagree."""

import math

import numpy as np
import pytest
import torch
from sklearn import metrics as oracle

from dinov2.errors import DatasetError
from dinov2.eval import scores as module
from dinov2.eval.scores import (
    SCORES,
    Predictions,
    bootstrap,
    confusion_matrix,
    interval,
    paired_bootstrap,
    per_class_scores,
    score,
)


def make(samples: int, classes: int, seed: int = 0, *, levels: int | None = None, of: int | None = None):
    """Labels of the first ``of`` classes; ``levels`` rounds the scores, which makes ties."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, of or classes, (samples,), generator=generator)
    logits = torch.randn(samples, classes, generator=generator, dtype=torch.float64)
    logits[torch.arange(samples), labels] += 1.0
    if levels:
        logits = (logits * levels).round() / levels
    return Predictions(labels, logits.softmax(dim=1))


CASES = {
    "nine classes": make(700, 9),
    "binary": make(300, 2),
    "ties": make(300, 4, levels=1),
    "binary ties": make(300, 2, levels=1),
    "absent classes": make(300, 6, of=4),
    "twelve samples": make(12, 3),
    "one sample": make(1, 3),
}


def expected_scores(labels, scores):
    """scikit-learn's numbers, NaN where it has none."""
    classes = range(scores.shape[1])
    predicted = scores.argmax(axis=1)
    areas = [
        oracle.roc_auc_score(labels == number, scores[:, number])
        for number in ([1] if len(classes) == 2 else classes)
        if 0 < (labels == number).sum() < len(labels)
    ]
    f1 = {
        average: oracle.f1_score(labels, predicted, average=average, zero_division=0)
        for average in ("macro", "weighted")
    }
    disagree = (labels[:, None] != predicted[None]).any()
    return {
        "accuracy": oracle.accuracy_score(labels, predicted),
        "balanced_accuracy": oracle.recall_score(
            labels, predicted, labels=np.unique(labels), average="macro", zero_division=0
        ),
        "macro_f1": f1["macro"],
        "weighted_f1": f1["weighted"],
        "auroc": np.mean(areas) if areas else math.nan,
        "quadratic_kappa": oracle.cohen_kappa_score(labels, predicted, labels=classes, weights="quadratic")
        if disagree
        else math.nan,
        "macro_jaccard": oracle.jaccard_score(labels, predicted, average="macro", zero_division=0),
    }


@pytest.mark.parametrize("case", CASES)
def test_scores_equal_scikit_learn(case):
    predictions = CASES[case]
    expected = expected_scores(predictions.labels.numpy(), predictions.scores.numpy())
    assert tuple(expected) == SCORES
    assert score(predictions) == pytest.approx(expected, abs=1e-9, nan_ok=True)


@pytest.mark.parametrize("case", CASES)
def test_classes_equal_scikit_learn(case):
    predictions = CASES[case]
    labels, scores = predictions.labels.numpy(), predictions.scores.numpy()
    predicted, classes = scores.argmax(axis=1), range(scores.shape[1])
    found = per_class_scores(predictions)
    precision, recall, f1, support = oracle.precision_recall_fscore_support(
        labels, predicted, labels=classes, zero_division=0
    )
    occurs = np.isin(classes, [*labels, *predicted])
    np.testing.assert_array_equal(found["support"], support)
    np.testing.assert_allclose(found["recall"], np.where(support, recall, np.nan), atol=1e-9)
    np.testing.assert_allclose(found["precision"], np.where(occurs, precision, np.nan), atol=1e-9)
    np.testing.assert_allclose(found["f1"], np.where(occurs, f1, np.nan), atol=1e-9)
    for number, area in enumerate(found["auroc"]):
        if 0 < support[number] < len(labels):
            assert area == pytest.approx(oracle.roc_auc_score(labels == number, scores[:, number]), abs=1e-9)
        else:
            assert math.isnan(area)
    np.testing.assert_array_equal(
        confusion_matrix(predictions).numpy(), oracle.confusion_matrix(labels, predicted, labels=classes)
    )


def test_multiclass_area_is_scikit_learns():
    predictions = CASES["nine classes"]
    expected = oracle.roc_auc_score(predictions.labels, predictions.scores, multi_class="ovr")
    assert score(predictions)["auroc"] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("case", ["nine classes", "binary ties", "absent classes", "twelve samples"])
def test_draws_are_the_scores_of_resampled_samples(monkeypatch, case):
    predictions = CASES[case]
    count = len(predictions.labels)
    monkeypatch.setattr(module, "BLOCK_WEIGHTS", 2 * count)  # several blocks, the last one not full
    drawn = bootstrap(predictions, draws=5, seed=3)
    weights = torch.cat(list(module.draw_weights(count, 5, 3)), dim=1)
    assert weights.shape == (count, 5) and (weights.sum(dim=0) == count).all()
    for column in range(5):
        rows = torch.arange(count).repeat_interleave(weights[:, column].long())
        expected = expected_scores(predictions.labels[rows].numpy(), predictions.scores[rows].numpy())
        for name in SCORES:
            assert drawn[name][column].item() == pytest.approx(expected[name], abs=1e-9, nan_ok=True)


def test_intervals_repeat_cover_the_score_and_have_the_width_of_theory():
    predictions = make(2000, 5)
    first, again, other = (bootstrap(predictions, seed=seed) for seed in (0, 0, 1))
    value = score(predictions)
    for name in SCORES:
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], other[name])
        low, high = interval(first[name])
        assert low < value[name] < high
    low, high = interval(first["accuracy"])
    error = math.sqrt(value["accuracy"] * (1 - value["accuracy"]) / 2000)
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_one_class_has_no_area_and_no_kappa():
    predictions = Predictions(torch.zeros(5, dtype=torch.long), torch.tensor([[0.9, 0.1]]).repeat(5, 1))
    found = score(predictions)
    assert (found["accuracy"], found["balanced_accuracy"]) == (1, 1)
    assert math.isnan(found["auroc"]) and math.isnan(found["quadratic_kappa"])
    assert all(map(math.isnan, interval(bootstrap(predictions, draws=10)["auroc"])))


def test_areas_of_very_many_classes_have_no_interval(monkeypatch):
    monkeypatch.setattr(module, "MOST_AUROC_ADDITIONS", 1000)
    drawn = bootstrap(CASES["nine classes"], draws=5)
    assert drawn["auroc"].isnan().all() and drawn["accuracy"].isfinite().all()


def test_paired_comparison():
    worse = make(800, 4)
    better = Predictions(
        worse.labels, (worse.scores.log() + torch.nn.functional.one_hot(worse.labels)).softmax(dim=1)
    )
    table = paired_bootstrap(worse, better)
    assert tuple(table) == SCORES
    row = table["balanced_accuracy"]
    assert row["difference"] == pytest.approx(row["second"] - row["first"]) and row["difference"] > 0
    assert 0 < row["interval"][0] < row["difference"] < row["interval"][1]
    assert row["p_value"] < 0.01
    backwards = paired_bootstrap(better, worse)["balanced_accuracy"]
    assert backwards["interval"] == pytest.approx([-row["interval"][1], -row["interval"][0]])
    same = paired_bootstrap(worse, worse)["accuracy"]
    assert (same["difference"], same["interval"], same["p_value"]) == (0, [0, 0], 1)
    # Paired draws see that one model is a little better everywhere; unpaired intervals overlap.
    alone = interval(bootstrap(worse)["balanced_accuracy"])
    assert row["interval"][1] - row["interval"][0] < alone[1] - alone[0]


def test_unusable_predictions_are_named():
    good = torch.full((3, 2), 0.5)
    with pytest.raises(DatasetError, match=r"label 2 is not among the classes 0\.\.1"):
        Predictions(torch.tensor([0, 1, 2]), good)
    with pytest.raises(DatasetError, match="scores of 1 of 3 samples are not finite"):
        Predictions(torch.tensor([0, 1, 1]), torch.tensor([[0.0, 1], [math.nan, 0], [1, 0]]))
    with pytest.raises(DatasetError, match="no samples to score"):
        Predictions(torch.zeros(0, dtype=torch.long), good[:0])
    with pytest.raises(DatasetError, match="not of the same samples"):
        paired_bootstrap(make(10, 3), make(10, 3, seed=1))
