"""Signals without labels: against numpy, on features whose signal is known, and where there is none."""

import math

import numpy as np
import pytest
import torch

from dinov2.eval import health


def random_features(count=64, width=24, seed=0):
    values = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return values * torch.linspace(0.2, 3.0, width) + 0.7


def numpy_signals(features):
    """An independent computation, from singular values of the whole matrix and from all pairs."""
    rows = features.double().numpy()
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    centred = rows - rows.mean(axis=0)

    def effective_rank(matrix):
        shares = np.linalg.svd(matrix, compute_uv=False)
        shares = shares / shares.sum()
        shares = shares[shares > 1e-14]
        return np.exp(-(shares * np.log(shares)).sum())

    eigenvalues = np.sort(np.linalg.eigvalsh(np.cov(rows.T)))[::-1]
    last = min(rows.shape[1], 200, len(rows) - 1)
    indices = np.arange(11, last + 1)
    slope, _ = np.polyfit(np.log(indices), np.log(eigenvalues[10:last]), 1)
    pairs = (unit @ unit.T)[~np.eye(len(rows), dtype=bool)]
    return {
        "rankme": effective_rank(rows),
        "rankme_centered": effective_rank(centred),
        "alpha_req": -slope,
        "feature_std": unit.std(axis=0).mean(),
        "mean_cosine": pairs.mean(),
        "feature_norm": np.linalg.norm(rows, axis=1).mean(),
    }


@pytest.mark.parametrize(("count", "width"), [(64, 24), (300, 24), (40, 60), (25, 24)])
def test_signals_equal_numpy(count, width):
    features = random_features(count, width)
    assert health.feature_signals(features) == pytest.approx(numpy_signals(features), rel=1e-9)


def test_rankme_of_known_ranks():
    orthonormal = torch.linalg.qr(torch.randn(50, 12, generator=torch.Generator().manual_seed(1)).double()).Q
    assert health.rankme(orthonormal) == pytest.approx(12, rel=1e-12)
    one = torch.outer(torch.arange(1.0, 9.0), torch.arange(1.0, 6.0))
    assert health.rankme(one) == pytest.approx(1, abs=1e-9)
    assert health.rankme(random_features(8, 30)) <= 8
    assert health.rankme(torch.ones(8, 5)) == pytest.approx(1, abs=1e-9)
    assert math.isnan(health.rankme_centered(torch.full((8, 5), 0.1)))


def test_a_shared_direction_counts_unless_centred():
    features = random_features() - 0.7
    shifted = features + 100
    assert health.rankme(shifted) < 0.5 * health.rankme(features)
    assert health.rankme_centered(shifted) == pytest.approx(health.rankme_centered(features), rel=1e-4)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.5])
def test_alpha_of_a_power_law(alpha):
    generator = torch.Generator().manual_seed(2)
    # Orthonormal centred columns have the eigenvalues that they are scaled to.
    noise = torch.randn(400, 250, generator=generator).double()
    columns = torch.linalg.qr(noise - noise.mean(dim=0)).Q
    eigenvalues = torch.arange(1, 251, dtype=torch.float64) ** -alpha
    eigenvalues[:10] *= 50  # before the range
    eigenvalues[200:] *= 1e-3  # behind it
    assert health.alpha_req(columns * eigenvalues.sqrt()) == pytest.approx(alpha, rel=1e-9)


def test_alpha_is_not_defined_for_a_short_spectrum():
    assert math.isnan(health.alpha_req(random_features(64, 19)))
    assert not math.isnan(health.alpha_req(random_features(64, 20)))
    assert math.isnan(health.alpha_req(random_features(20, 64)))
    assert not math.isnan(health.alpha_req(random_features(21, 64)))
    low_rank = random_features(64, 15).double() @ torch.randn(15, 40).double()
    assert math.isnan(health.alpha_req(low_rank)), "rounding was taken for a spectrum"


def test_feature_std_of_an_even_spread_and_of_none():
    width = 48
    sphere = torch.randn(20_000, width, generator=torch.Generator().manual_seed(3))
    assert health.feature_std(sphere) == pytest.approx(1 / math.sqrt(width), rel=5e-3)
    assert health.feature_std_share(sphere) == pytest.approx(1, rel=5e-3)
    assert health.mean_cosine(sphere) == pytest.approx(0, abs=1e-3)
    same = torch.outer(torch.arange(1.0, 9.0), torch.arange(1.0, 6.0))
    assert health.feature_std(same) == pytest.approx(0, abs=1e-12)
    assert health.mean_cosine(same) == pytest.approx(1)
    assert health.mean_cosine(torch.tensor([[1.0, 0.0], [-2.0, 0.0]])) == pytest.approx(-1)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_features_that_are_not_finite_have_no_signals(broken):
    features = random_features()
    features[3, 2] = broken
    assert all(math.isnan(value) for value in health.feature_signals(features).values())
    assert math.isnan(health.matched_cosine(features, random_features()))
    assert math.isnan(health.linear_cka(random_features(), features))


def test_one_image_has_no_signals():
    assert all(math.isnan(value) for value in health.feature_signals(random_features(1)).values())


def test_cka_equals_its_definition_on_centred_kernels():
    first, second = random_features(40, 30, seed=4), random_features(40, 12, seed=5)
    second[:, :6] += first[:, :6]
    centring = np.eye(40) - 1 / 40
    kernels = [centring @ (x.double().numpy() @ x.double().numpy().T) @ centring for x in (first, second)]
    expected = (kernels[0] * kernels[1]).sum() / np.prod([np.linalg.norm(kernel) for kernel in kernels])
    assert health.linear_cka(first, second) == pytest.approx(expected, rel=1e-10)
    assert 0.05 < expected < 0.95
    turn = torch.linalg.qr(torch.randn(30, 30, generator=torch.Generator().manual_seed(6)).double()).Q
    assert health.linear_cka(first, 3 * first.double() @ turn + 5) == pytest.approx(1, rel=1e-10)
    assert math.isnan(health.linear_cka(first, torch.ones(40, 3)))


def test_matched_cosine_compares_each_image_with_itself():
    first, second = random_features(seed=7), random_features(seed=8)
    a, b = first.double().numpy(), second.double().numpy()
    expected = ((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).mean()
    assert health.matched_cosine(first, second) == pytest.approx(expected, rel=1e-12)
    assert health.matched_cosine(first, 4 * first) == pytest.approx(1)


def test_prototype_signals_equal_numpy_whatever_the_chunks():
    rows = torch.softmax(3 * torch.randn(50, 20, generator=torch.Generator().manual_seed(9)), dim=1)
    p = rows.double().numpy()
    mean = p.mean(axis=0)
    usage = -(mean * np.log(mean)).sum()
    expected = {
        "prototype_entropy": -(p * np.log(p)).sum(axis=1).mean(),
        "prototype_usage_entropy": usage,
        "prototype_perplexity": np.exp(usage),
        "prototypes_used": len(set(p.argmax(axis=1))) / 20,
    }
    assert expected["prototypes_used"] < 1
    for size in (7, 50):
        assert health.prototype_signals(rows.split(size)) == pytest.approx(expected, rel=1e-6)


def test_prototype_signals_of_the_three_collapses():
    one = torch.zeros(12, 8)
    one[:, 3] = 1
    signals = health.prototype_signals([one])
    assert (signals["prototype_entropy"], signals["prototype_perplexity"]) == (0, 1)
    assert signals["prototypes_used"] == 1 / 8
    uniform = health.prototype_signals([torch.full((12, 8), 1 / 8)])
    assert uniform["prototype_entropy"] == pytest.approx(math.log(8))
    assert uniform["prototype_perplexity"] == pytest.approx(8)
    healthy = health.prototype_signals([torch.eye(8)])
    assert healthy["prototype_entropy"] == 0
    assert healthy["prototype_perplexity"] == pytest.approx(8)
    assert healthy["prototypes_used"] == 1
    broken = torch.full((2, 8), math.nan)
    assert all(math.isnan(value) for value in health.prototype_signals([torch.eye(8), broken]).values())
    assert all(math.isnan(value) for value in health.prototype_signals([]).values())


def test_kl_divergence():
    p, q = (
        torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]),
        torch.tensor([[0.25, 0.5, 0.25], [1.0, 0.0, 0.0]]),
    )
    assert health.kl_divergence(p, q).tolist() == pytest.approx([0.5 * math.log(2), 0])
    assert health.kl_divergence(torch.tensor([0.5, 0.5]), torch.tensor([1.0, 0.0])).item() == math.inf
