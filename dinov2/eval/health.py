"""Signals that say without labels whether features and prototype assignments are healthy.

Shapes: N images, D width, K prototypes. All is computed in float64. A signal that is not defined is NaN: of
features that are not finite, of fewer than two images, of a spectrum that is too short.

Sources: RankMe, Garrido et al. 2023 (arXiv:2210.02885); alpha-ReQ, Agrawal et al. 2022 (NeurIPS); linear CKA,
Kornblith et al. 2019 (arXiv:1905.00414); the rest follows from its definition.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional

NAN = float("nan")

# alpha-ReQ fits a line to the eigenvalues of these indices, counted from 1, and to no fewer than so many.
FIRST_INDEX, LAST_INDEX, FEWEST_POINTS = 11, 200, 10


def rankme(features: Tensor) -> float:
    """Return how many directions the features (N, D) use, from 1 to min(N, D).

    The exponential of the entropy of the singular values, divided by their sum. As in the paper the features
    are not centred. Its epsilon of 1e-7 keeps the logarithm of float32 finite, and is not needed here.
    """
    if not _usable(features):
        return NAN
    values = _singular_values(features.double())
    return math.exp(_entropy(values / values.sum()).item()) if values.sum() > 0 else NAN


def rankme_centered(features: Tensor) -> float:
    """Return :func:`rankme` of the features (N, D) less their mean: a direction all share does not count.

    NaN if all rows are equal.
    """
    return rankme(_centered(features)) if _usable(features) and not _constant(features) else NAN


def alpha_req(features: Tensor) -> float:
    """Return how fast the eigenvalues of the covariance of the features (N, D) fall: as ``index**-alpha``.

    A line through the logarithms of eigenvalues and indices, by least squares, over the indices 11 to
    min(D, 200). The covariance of N images has N - 1 eigenvalues, and those below the rounding of the largest
    say nothing: the range ends before. NaN with fewer than 10 left. With N not far above D the last
    eigenvalues are too small, and alpha too large: compare values of equal N alone.
    """
    if not _usable(features) or _constant(features):
        return NAN
    spread = _singular_values(_centered(features)).square()
    floor = spread[0] * (max(features.shape) * torch.finfo(torch.float64).eps) ** 2
    last = min(LAST_INDEX, features.shape[1], len(features) - 1, int((spread > floor).sum()))
    if last - FIRST_INDEX + 1 < FEWEST_POINTS:
        return NAN
    indices = torch.arange(FIRST_INDEX, last + 1, dtype=torch.float64).log()
    values = spread[FIRST_INDEX - 1 : last].cpu().log()
    indices, values = indices - indices.mean(), values - values.mean()
    return -(indices @ values / indices.square().sum()).item()


def feature_std(features: Tensor) -> float:
    """Return the standard deviation over images of the unit features (N, D), its mean over dimensions.

    At most 1 / sqrt(D), which features spread evenly over the sphere have; 0 if all point the same way.
    """
    if not _usable(features):
        return NAN
    return _unit(features).std(dim=0, correction=0).mean().item()


def feature_std_share(features: Tensor) -> float:
    """Return :func:`feature_std` as a share, 0 to 1, of the 1 / sqrt(D) of an even spread."""
    return feature_std(features) * math.sqrt(features.shape[1])


def mean_cosine(features: Tensor) -> float:
    """Return the mean cosine of two different images' features (N, D); 1 if all point the same way."""
    if not _usable(features):
        return NAN
    unit, count = _unit(features), len(features)
    # The sum over all pairs is the squared length of the sum; a row with itself does not count.
    return ((unit.sum(dim=0).square().sum() - unit.square().sum()) / (count * (count - 1))).item()


def feature_norm(features: Tensor) -> float:
    """Return the mean length of the features (N, D)."""
    return features.double().norm(dim=1).mean().item() if _usable(features) else NAN


def feature_signals(features: Tensor) -> dict[str, float]:
    """Return all signals of one set of features (N, D), by name."""
    return {
        "rankme": rankme(features),
        "rankme_centered": rankme_centered(features),
        "alpha_req": alpha_req(features),
        "feature_std": feature_std(features),
        "mean_cosine": mean_cosine(features),
        "feature_norm": feature_norm(features),
    }


def matched_cosine(features: Tensor, others: Tensor) -> float:
    """Return the mean cosine of each image's features (N, D) with its other ones (N, D): 1 if none turned."""
    if not (_usable(features) and _usable(others)):
        return NAN
    return (_unit(features) * _unit(others)).sum(dim=1).mean().item()


def linear_cka(features: Tensor, others: Tensor) -> float:
    """Return how alike two sets of features of the same images, (N, D) and (N, E), are: from 0 to 1.

    Centred kernel alignment with a linear kernel. Rotating, scaling or shifting either set changes nothing.
    NaN if all rows of a set are equal.
    """
    if not (_usable(features) and _usable(others)) or _constant(features) or _constant(others):
        return NAN
    first, second = _centered(features), _centered(others)
    cross = (first.T @ second).square().sum()
    return (cross / ((first.T @ first).norm() * (second.T @ second).norm())).item()


def prototype_signals(chunks: Iterable[Tensor]) -> dict[str, float]:
    """Return how images are assigned to prototypes, in nats.

    Args:
        chunks: Probabilities (n, K) of the images, some at a time; rows sum to 1.

    Returns:
        ``prototype_entropy``, the mean entropy of an image's assignment: 0 if each has one prototype, log K
        if it belongs to all alike. ``prototype_usage_entropy``, the entropy of the mean assignment: 0 if all
        images have the same prototype; ``prototype_perplexity`` is its exponential, the number of prototypes
        in use. ``prototypes_used``, the share of the K that are the largest of some image, at most N / K.
    """
    entropies, count, total, largest = 0.0, 0, None, set()
    for rows in chunks:
        rows = rows.double()
        entropies += _entropy(rows).sum().item()
        count += len(rows)
        total = rows.sum(dim=0) if total is None else total + rows.sum(dim=0)
        largest.update(rows.argmax(dim=1).tolist())
    if not count or not (total.isfinite().all() and math.isfinite(entropies)):
        names = ("prototype_entropy", "prototype_usage_entropy", "prototype_perplexity", "prototypes_used")
        return dict.fromkeys(names, NAN)
    usage = _entropy(total / count).item()
    return {
        "prototype_entropy": entropies / count,
        "prototype_usage_entropy": usage,
        "prototype_perplexity": math.exp(usage),
        "prototypes_used": len(largest) / len(total),
    }


def kl_divergence(rows: Tensor, others: Tensor) -> Tensor:
    """Return the Kullback-Leibler divergence (n,) of ``others`` (n, K) from ``rows`` (n, K), in nats.

    Infinite where ``others`` is 0 and ``rows`` is not.
    """
    rows, others = rows.double(), others.double()
    return (torch.special.xlogy(rows, rows) - torch.special.xlogy(rows, others)).sum(dim=-1)


def _usable(features: Tensor) -> bool:
    return len(features) > 1 and bool(features.isfinite().all())


def _constant(features: Tensor) -> bool:
    return bool((features == features[0]).all())


def _unit(features: Tensor) -> Tensor:
    return functional.normalize(features.double(), dim=1)


def _centered(features: Tensor) -> Tensor:
    features = features.double()
    return features - features.mean(dim=0)


def _singular_values(matrix: Tensor) -> Tensor:
    """Return the min(N, D) singular values, descending; a QR first, as N may be many times D."""
    if matrix.shape[0] > matrix.shape[1]:
        matrix = torch.linalg.qr(matrix, mode="r").R
    return torch.linalg.svdvals(matrix)


def _entropy(probabilities: Tensor) -> Tensor:
    """Return the entropy over the last axis, in nats."""
    return -torch.special.xlogy(probabilities, probabilities).sum(dim=-1)
