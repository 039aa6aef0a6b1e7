"""Scores and cross-entropy in one function, against the two written out and differentiated by autograd."""

import pytest
import torch

from dinov2.compiled import uncompiled
from dinov2.layers import DINOHead
from dinov2.loss import prototypes as module
from dinov2.loss import tiles
from dinov2.loss.prototypes import Term, prototype_cross_entropy
from dinov2.loss.targets import Targets

K, WIDTH, TEMPERATURE = 37, 8, 0.1
VIEWS, COUNT, SINGLE = 3, 5, 7  # a term of three views of five rows, and one of seven rows


def problem(seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(VIEWS * COUNT + SINGLE, WIDTH, generator=generator).requires_grad_()
    matrix = torch.randn(K, WIDTH, generator=generator).requires_grad_()
    targets = [torch.rand(n, K, generator=generator).softmax(-1) for n in (COUNT, COUNT, SINGLE)]
    weights = [torch.rand(n, generator=generator) for n in (COUNT, SINGLE)]
    return features, matrix, targets, weights


def terms_of(targets, weights):
    return [
        Term(0, VIEWS, weights[0], [as_targets(part) for part in targets[:2]]),
        Term(VIEWS * COUNT, 1, weights[1], [as_targets(targets[2])]),
    ]


def as_targets(probabilities):
    """Targets are kept as scores and a bias."""
    scores = 0.5 * probabilities.log()
    return Targets(scores + torch.arange(K), temperature=0.5, bias=-2.0 * torch.arange(K))


def written_out(features, matrix, targets, weights):
    log_probs = torch.log_softmax((features @ matrix.T).float() / TEMPERATURE, dim=-1)
    rows = -(torch.cat([targets[0] + targets[1]] * VIEWS + [targets[2]]) * log_probs).sum(-1)
    return torch.dot(rows, torch.cat([weights[0]] * VIEWS + [weights[1]])), rows


@pytest.mark.parametrize("block_rows", [1000, 6, 1], ids="block of {} rows".format)
@pytest.mark.parametrize("tile_rows", [1000, 2], ids="tiles of {} rows".format)
def test_loss_rows_and_gradients(block_rows, tile_rows, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_BYTES", block_rows * K * 4)
    monkeypatch.setitem(tiles.TILE_BYTES, "cpu", tile_rows * K * 4)
    features, matrix, targets, weights = problem()
    expected, expected_rows = written_out(features, matrix, targets, weights)
    (3.0 * expected).backward()
    expected_gradients = features.grad, matrix.grad

    features.grad = matrix.grad = None
    total, rows = prototype_cross_entropy(features, matrix, terms_of(targets, weights), TEMPERATURE)
    (3.0 * total).backward()
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rows, expected_rows, rtol=1e-5, atol=1e-5)
    assert not rows.requires_grad
    for got, wanted in zip((features.grad, matrix.grad), expected_gradients, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("which", ["features", "matrix", "neither"])
def test_gradients_that_nobody_wants_are_not_made(which):
    features, matrix, targets, weights = problem()
    features.requires_grad_(which == "features")
    matrix.requires_grad_(which == "matrix")
    total, _ = prototype_cross_entropy(features, matrix, terms_of(targets, weights), TEMPERATURE)
    torch.testing.assert_close(total, written_out(features, matrix, targets, weights)[0])
    if which == "neither":
        assert not total.requires_grad
        return
    total.backward()
    assert (features.grad is not None, matrix.grad is not None) == (which == "features", which == "matrix")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_in_half_precision_and_the_rest_in_float32(dtype):
    features, matrix, targets, weights = problem()
    small = [weight * 1e-6 for weight in weights]  # as of a large batch; float16 alone would lose them
    expected, _ = written_out(features, matrix, targets, small)
    expected.backward()
    wanted = features.grad.clone(), matrix.grad.clone()
    features.grad = matrix.grad = None
    with torch.autocast("cpu", dtype=dtype):
        total, rows = prototype_cross_entropy(features, matrix, terms_of(targets, small), TEMPERATURE)
    total.backward()
    assert total.dtype == rows.dtype == features.grad.dtype == matrix.grad.dtype == torch.float32
    torch.testing.assert_close(total, expected, rtol=2e-2, atol=0.0)
    for got, exact in zip((features.grad, matrix.grad), wanted, strict=True):
        assert (got - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("compile", [False, True])
def test_targets_in_half_precision_are_read_in_float32(compile):
    """Run as written: a compiler that fails does not keep more digits than the code says."""
    features, matrix, probabilities, weights = problem()
    bias = torch.linspace(-1.0, 1.0, K)
    rough = [Targets(part.log().bfloat16(), 0.3, bias) for part in probabilities]
    expected, rows = written_out(features, matrix, [part.dense() for part in rough], weights)
    terms = [Term(0, VIEWS, weights[0], rough[:2]), Term(VIEWS * COUNT, 1, weights[1], rough[2:])]
    with uncompiled():
        total, found = prototype_cross_entropy(features, matrix, terms, TEMPERATURE, compile=compile)
    torch.testing.assert_close(found, rows, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(total, (features, matrix))
    for got, wanted in zip(gradients, torch.autograd.grad(expected, (features, matrix)), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_no_rows_are_no_loss_with_a_graph():
    features = torch.empty(0, WIDTH, requires_grad=True)
    matrix = torch.randn(K, WIDTH, requires_grad=True)
    terms = [Term(0, 1, torch.empty(0), [as_targets(torch.empty(0, K))])]
    total, rows = prototype_cross_entropy(features, matrix, terms, TEMPERATURE)
    total.backward()
    assert total.item() == 0.0 and rows.shape == (0,)
    assert matrix.grad.abs().sum() == 0 and features.grad.shape == (0, WIDTH)


def test_a_second_backward_pass_is_refused_rather_than_wrong():
    features, matrix, targets, weights = problem()
    total, _ = prototype_cross_entropy(features, matrix, terms_of(targets, weights), TEMPERATURE)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace operation"):
        total.backward()


def test_scores_far_apart_stay_finite():
    features, matrix, targets, weights = problem()
    scaled = (features.detach() * 1e4).requires_grad_()
    total, rows = prototype_cross_entropy(scaled, matrix, terms_of(targets, weights), TEMPERATURE)
    total.backward()
    assert torch.isfinite(rows).all() and torch.isfinite(scaled.grad).all()
    torch.testing.assert_close(total, written_out(scaled, matrix, targets, weights)[0], rtol=1e-5, atol=0.0)


def test_a_head_hands_its_features_and_prototypes_on():
    head = DINOHead(6, K, hidden_dim=9, bottleneck_dim=WIDTH)
    tokens = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    product = head(tokens, lambda features, matrix: features @ matrix.T)
    torch.testing.assert_close(product, head(tokens))
