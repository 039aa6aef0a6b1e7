"""Logistic regression against scikit-learn's, with the same C."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression as Oracle

from dinov2.errors import DatasetError
from dinov2.eval.logistic import fit_logistic_regression


def _digits(num_classes: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """300 training images, 400 test images of the first classes of scikit-learn's digits."""
    data, target = load_digits(return_X_y=True)
    data, target = data[target < num_classes] / 16.0, target[target < num_classes]
    return torch.from_numpy(data[:300]), torch.from_numpy(target[:300]), torch.from_numpy(data[300:700])


@pytest.mark.parametrize("num_classes", [2, 3, 10])
@pytest.mark.parametrize("C", [1e-6, 1e-2, 1.0, 10.0])
def test_same_model_as_scikit_learn(num_classes, C):
    features, labels, test = _digits(num_classes)
    model = fit_logistic_regression(features, labels, C)
    oracle = Oracle(C=C, tol=1e-10, max_iter=20_000).fit(features.numpy(), labels.numpy())
    probabilities = model.predict_proba(test).numpy()
    np.testing.assert_allclose(probabilities, oracle.predict_proba(test.numpy()), rtol=0, atol=2e-4)
    assert (model.predict(test).numpy() == oracle.predict(test.numpy())).all()
    if num_classes > 2:  # two classes: scikit-learn keeps one vector, the difference of ours
        np.testing.assert_allclose(model.weight.numpy(), oracle.coef_, rtol=1e-3, atol=2e-4)
    else:
        np.testing.assert_allclose(model.weight[1] - model.weight[0], oracle.coef_[0], rtol=1e-3, atol=2e-4)


def test_classes_without_samples_are_never_predicted_and_stay_finite():
    features, labels, test = _digits(3)
    model = fit_logistic_regression(features, labels * 2, 1.0, num_classes=7)
    dense = fit_logistic_regression(features, labels, 1.0)
    assert model.weight.shape == (7, 64)
    assert torch.equal(model.predict(test), dense.predict(test) * 2)
    assert model.decision_function(test).isfinite().all()
    torch.testing.assert_close(model.predict_proba(test)[:, ::2][:, :3], dense.predict_proba(test))


def test_dtype_and_the_limit_on_iterations_are_kept():
    features, labels, _ = _digits(10)
    model = fit_logistic_regression(features, labels, 1e5, max_iter=3, dtype=torch.float32)
    assert model.weight.dtype == torch.float32
    assert model.num_iterations <= 3


def test_fits_inside_inference_mode():
    features, labels, test = _digits(3)
    with torch.inference_mode():
        model = fit_logistic_regression(features.clone(), labels, 1.0)
    assert torch.equal(model.predict(test), fit_logistic_regression(features, labels, 1.0).predict(test))


def test_one_class_is_refused():
    features, labels, _ = _digits(3)
    with pytest.raises(DatasetError, match="all 20 training samples have the label 4"):
        fit_logistic_regression(features[:20], torch.full((20,), 4), 1.0)
