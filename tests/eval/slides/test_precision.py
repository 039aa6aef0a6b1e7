"""Average precision against scikit-learn."""

import numpy as np
import pytest
import torch

from dinov2.eval.scores import Predictions, draw_weights
from dinov2.eval.slides.precision import average_precision, bootstrap_average_precision

sklearn_metrics = pytest.importorskip("sklearn.metrics")


def some(count: int, classes: int, seed: int, *, coarse: bool) -> Predictions:
    generator = np.random.default_rng(seed)
    scores = generator.random((count, classes))
    if coarse:
        scores = scores.round(1)
    labels = generator.integers(0, classes, count)
    return Predictions(torch.from_numpy(labels), torch.from_numpy(scores))


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("classes", [2, 4])
def test_it_equals_scikit_learn(classes, coarse):
    for seed in range(10):
        predictions = some(60, classes, seed, coarse=coarse)
        numbers = [1] if classes == 2 else range(classes)
        labels, scores = predictions.labels.numpy(), predictions.scores.numpy()
        each = [sklearn_metrics.average_precision_score(labels == n, scores[:, n]) for n in numbers]
        assert average_precision(predictions) == pytest.approx(np.mean(each), abs=1e-12)


def test_draws_are_those_of_the_other_scores():
    predictions = some(40, 2, 3, coarse=True)
    weights = torch.cat(list(draw_weights(40, 20, 7)), dim=1)
    labels, scores = predictions.labels.numpy(), predictions.scores.numpy()[:, 1]
    expected = [
        sklearn_metrics.average_precision_score(labels, scores, sample_weight=weights[:, n].numpy())
        for n in range(20)
    ]
    found = bootstrap_average_precision(predictions, 20, 7)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)


def test_without_positives_there_is_none():
    assert np.isnan(average_precision(Predictions(torch.zeros(3).long(), torch.rand(3, 2))))
