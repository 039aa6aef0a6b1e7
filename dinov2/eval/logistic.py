"""Multinomial logistic regression by L-BFGS on features held in memory.

Shapes: S samples, D width, C classes. The objective is scikit-learn's and cuML's: the sum of the cross
entropies plus the squared weights divided by 2C, the bias free.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from dinov2.errors import DatasetError
from dinov2.eval.neighbors import count_classes

# The logit of a class without training samples: never predicted, and still a number.
ABSENT_LOGIT = -1e30
GRADIENT_TOLERANCE = 1e-9
CHANGE_TOLERANCE = 1e-12
LINE_SEARCH_STEPS = 25  # of one iteration, at most


@dataclass(frozen=True)
class LogisticRegression:
    """A fitted linear classifier.

    Attributes:
        weight: (C, D).
        bias: (C,).
        num_iterations: L-BFGS iterations spent.
    """

    weight: Tensor
    bias: Tensor
    num_iterations: int

    def decision_function(self, features: Tensor) -> Tensor:
        """Return the logits (S, C) of ``features`` (S, D)."""
        return functional.linear(features.to(self.weight), self.weight, self.bias)

    def predict_proba(self, features: Tensor) -> Tensor:
        """Return the class probabilities (S, C)."""
        return self.decision_function(features).softmax(dim=1)

    def predict(self, features: Tensor) -> Tensor:
        """Return the classes (S,)."""
        return self.decision_function(features).argmax(dim=1)


@torch.inference_mode(False)
def fit_logistic_regression(
    features: Tensor,
    labels: Tensor,
    C: float,
    max_iter: int = 1000,
    *,
    num_classes: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> LogisticRegression:
    """Fit a logistic regression with an L2 penalty of strength 1/C, on the device of ``features``.

    Args:
        features: (S, D), used as they are: neither centred nor scaled.
        labels: Class indices (S,).
        C: Inverse of the penalty, as in scikit-learn.
        max_iter: L-BFGS iterations at most.
        num_classes: Number of classes; None is the largest label plus one. Classes without samples are
            never predicted.
        dtype: Floating type of the computation and of the result.

    Raises:
        DatasetError: The labels are negative, or all of one class.
    """
    num_classes = num_classes or count_classes(labels)
    features, labels = features.to(dtype), labels.to(features.device)
    if features.is_inference():
        features, labels = features.clone(), labels.clone()  # autograd refuses tensors of inference mode
    present, dense_labels = labels.unique(return_inverse=True)
    if len(present) < 2:
        raise DatasetError(
            f"all {len(labels)} training samples have the label {present.item()}: logistic regression needs "
            "samples of at least two classes"
        )
    weight, bias, num_iterations = _minimise(features, dense_labels, len(present), C, max_iter)
    all_weight = weight.new_zeros(num_classes, weight.shape[1])
    all_bias = bias.new_full((num_classes,), ABSENT_LOGIT)
    all_weight[present], all_bias[present] = weight, bias
    return LogisticRegression(all_weight, all_bias, num_iterations)


def _minimise(
    features: Tensor, labels: Tensor, num_classes: int, C: float, max_iter: int
) -> tuple[Tensor, Tensor, int]:
    weight = features.new_zeros(num_classes, features.shape[1], requires_grad=True)
    bias = features.new_zeros(num_classes, requires_grad=True)
    # Two classes are one weight vector w to scikit-learn. Here they are w/2 and -w/2, whose squares add up to
    # half as much.
    penalty = (2.0 if num_classes == 2 else 1.0) / (2.0 * C * len(labels))
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=max_iter,
        max_eval=max_iter * LINE_SEARCH_STEPS,  # else it may stop short of the iterations, unsaid
        tolerance_grad=GRADIENT_TOLERANCE,
        tolerance_change=CHANGE_TOLERANCE,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        logits = functional.linear(features, weight, bias)
        loss = functional.cross_entropy(logits, labels) + penalty * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(objective)
    return weight.detach(), bias.detach(), optimizer.state[weight]["n_iter"]
