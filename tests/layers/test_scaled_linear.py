"""LayerScale multiplied into the weights before it: the same results and gradients, and less that is kept."""

import copy

import pytest
import torch
from torch import nn

from dinov2.layers import LayerScale, MemEffAttention, Mlp, NestedTensorBlock, SwiGLUFFN, SwiGLUFFNAligned
from dinov2.layers.layer_scale import scaled_linear

GAINS = {
    "young": lambda: torch.full((6,), 1e-5),
    "grown": lambda: torch.tensor([0.3, -0.7, 1.2, 0.05, 0.4, 0.9]),
    "crossing zero": lambda: torch.tensor([0.0, -1e-7, 1e-5, 0.2, 0.0, 1.0]),
    "zero": lambda: torch.zeros(6),
}


def watched(module):
    """As it is without the short cut."""
    module.register_forward_hook(lambda *_: None)
    return module


def parts(gains, bias=True):
    torch.manual_seed(0)
    layer, scale = nn.Linear(4, 6, bias=bias), LayerScale(6, GAINS[gains]())
    return layer, scale, torch.randn(50, 4), torch.randn(50, 6)


def run(layer, scale, x, direction):
    """Result and gradients, all float32."""
    x = x.clone().requires_grad_()
    result = scaled_linear(layer, scale, x)
    (result.float() * direction).sum().backward()
    found = {"result": result.detach().float(), "x": x.grad}
    return found | {name: p.grad for name, p in nn.ModuleList([layer, scale]).named_parameters()}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gains", GAINS)
def test_it_is_the_layer_and_then_the_scale(gains, bias):
    layer, scale, x, direction = (part.double() for part in parts(gains, bias))
    expected = run(watched(copy.deepcopy(layer)), copy.deepcopy(scale), x, direction)
    found = run(layer, scale, x, direction)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-12, msg=name)


@pytest.mark.parametrize("gains", GAINS)
def test_in_16_bits_it_is_as_exact(gains):
    """Of what each should be, not further away than the layer and then the scale; as much is rounding."""
    layer, scale, x, direction = parts(gains)
    exact = run(watched(copy.deepcopy(layer)), copy.deepcopy(scale), x, direction)
    with torch.autocast("cpu", torch.bfloat16):
        usual = run(watched(copy.deepcopy(layer)), copy.deepcopy(scale), x, direction)
        found = run(layer, scale, x, direction)
    for name, value in exact.items():
        allowed = 2 * (usual[name] - value).norm() + 4 * torch.finfo(torch.bfloat16).eps * value.norm()
        assert (found[name] - value).norm() <= allowed, name


def test_the_result_of_the_layer_is_not_kept():
    layer, scale, x, _ = parts("grown")
    x.requires_grad_()

    def kept(*modules):
        shapes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(t.shape) or t, lambda t: t):
            scaled_linear(*modules, x)
        return shapes

    assert (50, 6) in kept(watched(copy.deepcopy(layer)), scale)
    assert (50, 6) not in kept(layer, scale)


def test_where_nothing_learns_or_somebody_looks_or_numbers_are_too_small_both_modules_run():
    layer, scale, x, _ = parts("grown")
    calls = []
    scale.register_forward_hook(lambda *_: calls.append("scale"))
    layer.register_forward_hook(lambda *_: calls.append("layer"))
    scaled_linear(layer, scale, x)
    assert calls == ["layer", "scale"]

    layer, scale, x, _ = parts("young")
    with torch.autocast("cpu", torch.float16):
        assert scaled_linear(layer, scale, x).equal(scale(layer(x)))

    plain = scale(layer(x))
    with torch.no_grad():
        assert scaled_linear(layer, scale, x).equal(plain)
    scale.requires_grad_(False)
    assert scaled_linear(layer, scale, x).equal(plain)
    assert scaled_linear(layer, None, x).equal(layer(x))
    identity = nn.Identity()
    assert scaled_linear(layer, identity, x).equal(layer(x))
    assert scaled_linear(nn.Sequential(layer), scale, x).equal(plain)


@pytest.mark.parametrize(
    "register",
    [
        nn.Module.register_forward_hook,
        nn.Module.register_forward_pre_hook,
        nn.Module.register_full_backward_hook,
        nn.Module.register_full_backward_pre_hook,
    ],
)
@pytest.mark.parametrize("number", [0, 1])
def test_every_kind_of_hook_is_called(register, number):
    layer, scale, x, _ = parts("grown")
    calls = []
    register((layer, scale)[number], lambda *_: calls.append(1))
    scaled_linear(layer, scale, x.requires_grad_()).sum().backward()
    assert calls == [1]


def test_traced_and_without_memory():
    block = NestedTensorBlock(24, 3, init_values=0.3, attn_class=MemEffAttention)
    x = torch.randn(2, 5, 24)
    torch.testing.assert_close(torch.jit.trace(block, x)(x), block(x))
    block.to("meta")(x.to("meta")).sum().backward()
    assert block.ls1.gamma.grad.shape == (24,)


class OwnFeedForward(Mlp):
    """Somebody's, which knows no scale."""

    def forward(self, x):
        return 2.0 * super().forward(x)


@pytest.mark.parametrize("ffn_layer", [Mlp, SwiGLUFFN, SwiGLUFFNAligned, OwnFeedForward])
@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_blocks(ffn_layer, rate):
    torch.manual_seed(0)
    kinds = {"attn_class": MemEffAttention, "ffn_layer": ffn_layer}
    block = NestedTensorBlock(24, 3, qkv_bias=True, init_values=0.3, drop_path=rate, **kinds).double()
    usual = copy.deepcopy(block)
    for scale in (usual.ls1, usual.ls2):
        watched(scale)
    x = [torch.randn(4, 5, 24).double(), torch.randn(6, 3, 24).double()]
    found = {}
    for name, module in (("folded", block), ("usual", usual)):
        torch.manual_seed(1)
        results = module(x)
        sum((result**2).sum() for result in results).backward()
        found[name] = results, [p.grad for p in module.parameters()]
    torch.testing.assert_close(*found.values(), rtol=1e-9, atol=1e-12)
