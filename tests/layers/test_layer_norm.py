"""Layer normalisation with weights of a narrower format than its input."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import AotEagerAndRecordGraphs

from dinov2.compiled import compiled, kept, uncompiled
from dinov2.layers.layer_norm import LayerNorm, normalised


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


@pytest.mark.parametrize(
    ("weights", "dtype", "tolerance"),
    [
        ("float32", torch.float32, 1e-6),
        ("float32", torch.bfloat16, 3e-3),
        ("bfloat16", torch.bfloat16, 4e-3),
    ],
)
def test_gradients_of_the_result_are_those_of_the_input(weights, dtype, tolerance):
    norm = filled(LayerNorm, getattr(torch, weights))
    x, direction = torch.randn(3, 50, 16, requires_grad=True), torch.randn(3, 50, 16)
    expected = F.layer_norm(x.double(), (16,), norm.weight.double(), norm.bias.double(), norm.eps)
    got = normalised(x, norm.weight, norm.bias, norm.eps, dtype)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected.float(), rtol=1e-5, atol=1e-5)
    wanted = torch.autograd.grad(expected, (x, norm.weight, norm.bias), direction.double())
    found = torch.autograd.grad(got, (x, norm.weight, norm.bias), direction)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == other.dtype
        assert (one - other).norm() <= tolerance * other.norm()


def test_what_is_to_be_kept_is_an_operator_like_others():
    torch.library.opcheck(kept, (torch.randn(2, 3),))


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr("dinov2.layers.layer_norm.DEVICES", ("cpu",))


def keeps_its_result(norm, x, *, number_format=torch.bfloat16) -> bool:
    """Tell whether compiled code keeps the norm's result in place of its input."""
    torch._dynamo.reset()
    compiler = AotEagerAndRecordGraphs()
    with torch.autocast("cpu", number_format, enabled=number_format is not None):
        compiled(norm.forward, backend=compiler)(x)
    return any("kept" in str(node.target) for graph in compiler.fw_graphs for node in graph.graph.nodes)


def test_compiled_code_keeps_its_result_where_gradients_are_taken_in_16_bits(as_on_a_gpu):
    norm, x = filled(LayerNorm, torch.float32), torch.randn(2, 5, 16, requires_grad=True)
    assert not keeps_its_result(norm, x)  # somebody else's compiler
    norm.compiled = True
    assert keeps_its_result(norm, x)
    assert keeps_its_result(norm, x, number_format=torch.float16)
    assert not keeps_its_result(norm, x, number_format=None)
    assert not keeps_its_result(norm, x.detach())
    with torch.no_grad():
        assert not keeps_its_result(norm, x)
    with torch.autocast("cpu", torch.bfloat16), uncompiled():
        assert torch.equal(norm(x), filled(nn.LayerNorm, torch.float32)(x))


def test_compiled_code_of_a_cpu_keeps_its_input():
    norm = filled(LayerNorm, torch.float32)
    norm.compiled = True
    assert not keeps_its_result(norm, torch.randn(2, 5, 16, requires_grad=True))


@pytest.mark.parametrize(
    ("shape", "options"), [(16, {"bias": False}), (16, {"elementwise_affine": False}), ((5, 16), {})]
)
def test_norms_of_other_kinds_stay_as_they_are(shape, options, as_on_a_gpu):
    norm, x = LayerNorm(shape, **options), torch.randn(2, 5, 16, requires_grad=True)
    norm.compiled = True
    assert not keeps_its_result(norm, x)
    assert torch.equal(norm(x), nn.LayerNorm(shape, **options)(x))


def test_narrow_weights_without_a_bias():
    x = torch.randn(2, 5, 16)
    norm = LayerNorm(16, bias=False).to(torch.bfloat16)
    assert torch.equal(norm(x), nn.LayerNorm(16, bias=False)(x))
