"""Scores made in several products equal those of one, and only where nothing watches."""

import pytest
import torch
import torch.nn.functional as F

from dinov2.layers.prototype_scores import COLUMNS, prototype_scores


@pytest.mark.parametrize("prototypes", [1, COLUMNS - 1, COLUMNS, 2 * COLUMNS + 3])
@pytest.mark.parametrize("shape", [(5,), (0,), (2, 3), (2, 0, 3), ()])
def test_several_products_equal_one(shape, prototypes):
    features, matrix = torch.randn(*shape, 16), torch.randn(prototypes, 16)
    scores = prototype_scores(features, matrix)
    assert scores.shape == (*shape, prototypes)
    torch.testing.assert_close(scores, F.linear(features, matrix), rtol=1e-5, atol=1e-5)


def test_autograd_is_served():
    features, matrix = (
        torch.randn(5, 16, requires_grad=True),
        torch.randn(COLUMNS + 3, 16, requires_grad=True),
    )
    direction = torch.randn(5, COLUMNS + 3)
    found = torch.autograd.grad((prototype_scores(features, matrix) * direction).sum(), (features, matrix))
    torch.testing.assert_close(found, (direction @ matrix, direction.T @ features), rtol=1e-4, atol=1e-4)


def test_autocast_is_served():
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert prototype_scores(torch.randn(5, 16), torch.randn(9, 16)).dtype == torch.bfloat16
