"""Layer normalisation with weights of a narrower format than its input."""

import pytest
import torch
from torch import nn

from dinov2.layers.layer_norm import LayerNorm


def filled(kind, dtype):
    torch.manual_seed(0)
    norm = kind(16, eps=1e-6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm.to(dtype)


@pytest.mark.parametrize(
    ("weights", "tokens"), [("float32", "float32"), ("bfloat16", "bfloat16"), ("float32", "bfloat16")]
)
def test_it_equals_pytorchs_where_that_takes_the_formats(weights, tokens):
    x = torch.randn(2, 5, 16, dtype=getattr(torch, tokens))
    dtype = getattr(torch, weights)
    got, expected = filled(LayerNorm, dtype)(x), filled(nn.LayerNorm, dtype)(x)
    assert got.dtype == expected.dtype
    assert torch.equal(got, expected)


def test_narrow_weights_are_widened_and_get_gradients_of_their_own_format():
    x = torch.randn(2, 5, 16)
    norm = filled(LayerNorm, torch.bfloat16)
    got = norm(x)
    assert torch.equal(got, filled(nn.LayerNorm, torch.bfloat16).float()(x))
    got.sum().backward()
    assert norm.weight.grad.dtype == torch.bfloat16
