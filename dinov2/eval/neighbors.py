"""The weighted vote of nearest neighbours: the mathematics of the k-NN evaluation.

Shapes: Q queries, S stored (training) rows, D width, C classes. Source: the weighted k-NN of Wu et al. 2018,
"Unsupervised feature learning via non-parametric instance discrimination", section 3.4.
"""

import logging
from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional

from dinov2.errors import DatasetError
from dinov2.eval.neighbor_search import find_neighbors

logger = logging.getLogger("dinov2")


def vote(
    similarities: Tensor, labels: Tensor, ks: Sequence[int], temperature: float, num_classes: int
) -> dict[int, Tensor]:
    """Return the class scores (Q, C) for every k.

    The weight of a neighbour is its softmax over all neighbours given, so the scores of a smaller k do not
    sum to one; which class wins is not affected.

    Args:
        similarities: (Q, K), nearest first, with K the largest k.
        labels: Labels of the neighbours (Q, K).
    """
    weights = functional.softmax(similarities / temperature, dim=1)
    zeros = weights.new_zeros(len(weights), num_classes)
    return {k: zeros.scatter_add(1, labels[:, :k], weights[:, :k]) for k in ks}


def usable_ks(ks: Sequence[int], num_stored: int) -> list[int]:
    """Return the distinct values of ``ks`` in ascending order, those above ``num_stored`` replaced by it."""
    too_large = sorted({k for k in ks if k > num_stored})
    if too_large:
        logger.warning(
            "k-NN with k = %s uses all %d training samples, there are no more",
            ", ".join(map(str, too_large)),
            num_stored,
        )
    return sorted({min(k, num_stored) for k in ks})


def count_classes(labels: Tensor) -> int:
    """Return the number of classes of training labels: the largest label plus one.

    Raises:
        DatasetError: There are no labels, or one is negative.
    """
    if not len(labels):
        raise DatasetError("the training dataset has no samples: evaluation needs labelled training images")
    if labels.min() < 0:
        raise DatasetError(
            f"the training labels contain {labels.min().item()}: labels must be class indices from 0, leave "
            "out the samples without a class"
        )
    return int(labels.max()) + 1


def knn_predict(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    k: int,
    temperature: float = 0.07,
    num_classes: int | None = None,
) -> Tensor:
    """Return the class scores of test features by the vote of their ``k`` nearest training features.

    Similarity is the cosine; nothing needs to be normalised before.

    Args:
        train_features: (S, D).
        train_labels: Class indices (S,).
        test_features: (Q, D).
        k: Number of neighbours; above S all of them vote, with a warning.
        temperature: Divides the similarity in the softmax of the weights.
        num_classes: C; None is the largest training label plus one.

    Returns:
        Scores (Q, C) float32, rows summing to one; ``argmax(dim=1)`` is the prediction.

    Raises:
        DatasetError: There are no training samples, or labels are negative.
    """
    num_classes = num_classes or count_classes(train_labels)
    (k,) = usable_ks([k], len(train_features))
    stored = functional.normalize(train_features.float(), dim=1)
    similarities, rows = find_neighbors(stored, functional.normalize(test_features.float(), dim=1), k)
    return vote(similarities, train_labels[rows], [k], temperature, num_classes)[k]
