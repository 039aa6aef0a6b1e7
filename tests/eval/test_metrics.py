"""Accuracies against scikit-learn and the numbers recorded from DINOv2."""

import numpy as np
import pytest
import torch
from sklearn import metrics as oracle

from dinov2.errors import DatasetError
from dinov2.eval.metrics import (
    ImageNetReaLAccuracy,
    MetricType,
    TopKAccuracy,
    balanced_accuracy,
    build_metric,
)
from tests.conftest import load_golden_json, load_golden_tensors


@pytest.fixture()
def scored():
    generator = torch.Generator().manual_seed(3)
    target = torch.randint(0, 6, (200,), generator=generator)
    scores = torch.randn(200, 8, generator=generator)  # classes 6 and 7 occur among predictions only
    scores[torch.arange(200), target] += 1.0
    return scores, target


def _value(metric, scores, target):
    for scores_part, target_part in zip(scores.split(33), target.split(33), strict=True):
        metric.update(scores_part, target_part)
    return metric.compute()


@pytest.mark.parametrize("k", [1, 3, 5])
def test_micro_is_top_k_accuracy(scored, k):
    scores, target = scored
    expected = oracle.top_k_accuracy_score(target, scores, k=k, labels=range(8))
    assert _value(TopKAccuracy(8, k), scores, target).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.filterwarnings("ignore:y_pred contains classes")
def test_macro_is_balanced_accuracy_and_none_is_recall(scored):
    scores, target = scored
    prediction = scores.argmax(dim=1)
    expected = oracle.balanced_accuracy_score(target, prediction)
    assert _value(TopKAccuracy(8, average="macro"), scores, target).item() == pytest.approx(
        expected, abs=1e-12
    )
    assert balanced_accuracy(prediction, target, 8) == pytest.approx(expected, abs=1e-12)
    recalls = oracle.recall_score(target, prediction, labels=range(8), average=None, zero_division=np.nan)
    np.testing.assert_allclose(_value(TopKAccuracy(8, average="none"), scores, target), recalls)


@pytest.mark.parametrize("run", load_golden_json("knn.json")["runs"], ids=lambda run: run["name"])
def test_recorded_accuracies(run):
    golden = load_golden_tensors("knn.safetensors")
    for k, by_average in run["accuracy"].items():
        for average, expected in by_average.items():
            metric = build_metric(MetricType[average], num_classes=7)
            metric.update(golden[f"{run['name']}.k{k}.probs"], golden["test_labels"])
            assert metric.compute()["top-1"].item() == pytest.approx(expected["top-1"], abs=1e-6)
            # Classes without votes tie, and the recording breaks such ties by chance.
            assert metric.compute()["top-5"].item() == pytest.approx(expected["top-5"], abs=0.03)


def test_several_labels_padding_and_unlabelled_samples():
    scores = torch.eye(4)[[0, 1, 2, 3]] + torch.eye(4)[[1, 2, 3, 0]] * 0.5
    labels = torch.tensor([[0, 3], [2, -1], [-1, -1], [1, 2]])
    metric = ImageNetReaLAccuracy(4)
    metric.update(scores, labels)
    assert metric.compute().item() == pytest.approx(1 / 3)
    top2 = ImageNetReaLAccuracy(4, top_k=2)
    top2.update(scores, labels)
    assert top2.compute().item() == pytest.approx(2 / 3)


@pytest.mark.parametrize("metric_type", list(MetricType))
def test_fewer_than_five_classes_have_no_top_5(metric_type):
    assert list(build_metric(metric_type, num_classes=3)) == ["top-1"]
    assert list(build_metric(metric_type, num_classes=5)) == ["top-1", "top-5"]
    assert list(build_metric(metric_type, num_classes=9, ks=(1, 3))) == ["top-1", "top-3"]


def test_ties_go_to_the_lower_class_and_non_finite_scores_miss():
    metric = TopKAccuracy(3)
    metric.update(torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0]]), torch.tensor([0, 1]))
    assert metric.compute().item() == 0.5
    metric.reset()
    metric.update(torch.full((3, 3), float("nan")), torch.tensor([0, 1, 2]))
    assert metric.compute().item() == 0.0


def test_copies_are_independent_and_reset_forgets(scored):
    scores, target = scored
    original = build_metric(MetricType.MEAN_ACCURACY, num_classes=8)
    copied = original.clone()
    copied.update(scores, target)
    assert original["top-1"].compute().isnan()
    copied.reset()
    assert copied["top-5"].compute().isnan()


@pytest.mark.parametrize("label", [-1, 4])
def test_labels_outside_the_classes_are_refused(label):
    with pytest.raises(DatasetError, match=rf"the label {label} is not among the classes 0\.\.3"):
        TopKAccuracy(4).update(torch.rand(2, 4), torch.tensor([0, label]))
