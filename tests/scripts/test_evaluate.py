"""Scores, their noise, and the table."""

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score
from sklearn.neighbors import KNeighborsClassifier

from scripts.quickstart.evaluate import PROBES, balanced, compare, format_table, score
from scripts.quickstart.features import histogram_features
from scripts.quickstart.sentences import change_sentence, spread_sentence
from scripts.quickstart.windows import Task


@pytest.fixture
def task():
    generator = np.random.default_rng(0)
    labels = {"train": generator.integers(3, size=90), "test": generator.integers(3, size=70)}
    pixels = {split: np.zeros((len(rows), 4, 4, 3), np.uint8) for split, rows in labels.items()}
    return Task("toy", ["a", "b", "c"], pixels, labels)


def clouds(task, distance, seed=0):
    """Features in three clouds ``distance`` apart."""
    generator = np.random.default_rng(seed)
    centres = distance * np.eye(3, 8)
    return {
        split: torch.from_numpy(centres[rows] + generator.normal(size=(len(rows), 8))).float()
        for split, rows in task.labels.items()
    }


@pytest.mark.parametrize("probe", list(PROBES))
def test_far_clouds_are_told_apart_and_noise_is_not(task, probe):
    far = score([clouds(task, 20)], task, probe)
    none = score([clouds(task, 0)], task, probe)
    assert (far.value, far.noise, far.subset_spread) == (1.0, 0.0, 0.0)
    assert abs(none.value - 1 / 3) < none.noise + 0.1
    assert 0.05 < none.noise < 0.2


def test_knn_agrees_with_scikit_learn(task):
    features = clouds(task, 2)
    ours = score([features], task, "k-NN")
    unit = {split: torch.nn.functional.normalize(rows, dim=1).numpy() for split, rows in features.items()}
    knn = KNeighborsClassifier(5, weights="distance").fit(unit["train"], task.labels["train"])
    theirs = balanced_accuracy_score(task.labels["test"], knn.predict(unit["test"]))
    assert ours.value == pytest.approx(theirs, abs=0.03)  # ties and weights differ


def test_seeds_are_averaged(task):
    sets = [clouds(task, 2, seed) for seed in range(3)]
    together = score(sets, task, "linear")
    assert len(set(together.by_seed)) == 3
    assert together.value == pytest.approx(np.mean(together.by_seed))


def test_a_change_is_judged_on_the_same_windows(task):
    weak, strong = (score([clouds(task, distance)], task, "k-NN") for distance in (1, 4))
    gain = compare(weak, strong, task)
    assert gain.value == pytest.approx(strong.value - weak.value)
    assert not gain.within_noise
    none = compare(weak, weak, task)
    assert (none.value, none.noise, none.within_noise) == (0.0, 0.0, True)


def test_balanced_weighs_classes_alike():
    assert balanced(np.array([1, 1, 1, 0]), np.array([0, 0, 0, 1])) == 0.5


def test_table_is_aligned_and_complete(task):
    rows = {name: {probe: score([clouds(task, 2)], task, probe) for probe in PROBES} for name in ("x", "y")}
    changes = {probe: compare(rows["x"][probe], rows["y"][probe], task) for probe in PROBES}
    lines = format_table({"toy": rows}, {"toy": changes}).splitlines()
    assert [line.split()[0] for line in lines] == ["toy", "k-NN", "x", "y", "after"]
    assert len({line.index("+-") for line in lines[2:]}) == 1
    assert "within the noise" in change_sentence("toy", changes)
    assert "standard deviation" in spread_sentence("toy", rows["x"], rows["y"])


def test_histograms_count_shares():
    grey = np.zeros((1, 2, 2, 3), np.uint8)
    grey[0, 0, 0] = 255
    assert histogram_features(grey, bins=4).tolist() == [[0.75, 0, 0, 0.25]]
    red = grey.copy()
    red[..., 1:] = 0
    assert histogram_features(red, bins=2).tolist() == [[0.75, 0.25, 1, 0, 1, 0]]
