"""Gradients of short sequences on a CPU: those of exact arithmetic, as near as PyTorch's own."""

import pytest
import torch
import torch.nn.functional as F

from dinov2.layers import backend, short_attention
from dinov2.layers.attention import MemEffAttention

SHAPES = [(3, 2, 50, 64), (2, 3, 257, 32), (40, 2, 5, 8), (1, 1, 1, 16)]


def gradient(attend, joint, wanted):
    """Of a joint projection [B, N, 3, H, E], as the model makes its queries, keys and values."""
    joint = joint.clone().requires_grad_()
    out = attend(*joint.permute(2, 0, 3, 1, 4))
    return out.detach(), torch.autograd.grad(out, joint, wanted.to(out.dtype))[0]


def draw(shape, spread=2.0):
    batch, heads, tokens, width = shape
    torch.manual_seed(0)
    joint = (spread * torch.randn(batch, tokens, 3, heads, width)).bfloat16()
    return joint, torch.randn(shape).bfloat16()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_further_from_exact_gradients_than_the_kernel(shape, monkeypatch):
    monkeypatch.setattr(short_attention, "SCORES", 2**12)  # several pieces
    joint, wanted = draw(shape)
    _, exact = gradient(F.scaled_dot_product_attention, joint.double(), wanted)
    out, ours = gradient(short_attention.short_attention, joint, wanted)
    same, kernel = gradient(F.scaled_dot_product_attention, joint, wanted)
    assert torch.equal(out, same)
    for part in range(3):
        want = exact[:, :, part]
        ours_off, kernel_off = ((g[:, :, part].double() - want).norm() for g in (ours, kernel))
        assert ours_off <= 1.2 * kernel_off + 1e-3 * want.norm()
        assert ours_off <= 5e-3 * want.norm()


def test_the_way_back_needs_no_autocast():
    joint, wanted = draw((2, 2, 20, 16))
    _, plain = gradient(short_attention.short_attention, joint, wanted)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, inside = gradient(short_attention.short_attention, joint, wanted)
    assert torch.equal(inside, plain)


def test_second_derivatives_are_refused():
    joint, wanted = draw((2, 2, 20, 16))
    joint.requires_grad_()
    loss = (short_attention.short_attention(*joint.permute(2, 0, 3, 1, 4)) * wanted).sum()
    with pytest.raises(RuntimeError, match='no second derivatives here; the backend "math" has'):
        torch.autograd.grad(loss, joint, create_graph=True)


@pytest.mark.parametrize(
    "change, used",
    [
        ({}, True),
        ({"dtype": torch.float32}, False),
        ({"tokens": 301}, False),
        ({"tokens": 31}, False),
        ({"requires_grad": False}, False),
        ({"is_causal": True}, False),
        ({"dropout_p": 0.1}, False),
        ({"capability": "AVX2"}, False),
    ],
    ids=str,
)
def test_where_it_is_used(change, used, monkeypatch):
    calls = []
    monkeypatch.setattr(backend, "short_attention", lambda q, k, v: calls.append(q.shape) or q)
    options = {"dtype": torch.bfloat16, "tokens": 50, "requires_grad": True, "capability": "AVX512", **change}
    capability = options.pop("capability")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    q, k, v = torch.randn(3, 2, 2, options.pop("tokens"), 8, dtype=options.pop("dtype"))
    k.requires_grad_(options.pop("requires_grad"))
    backend.attend(q, k, v, **options)
    assert len(calls) == used
    with torch.no_grad():
        backend.attend(q, k, v)
    assert len(calls) == used


def test_traced_code_does_without(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    layer, x = MemEffAttention(32, 2).bfloat16(), torch.randn(2, 40, 32).bfloat16()
    assert "ShortAttention" in str(next_functions(layer(x)))
    whole = torch.compile(layer, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(backend, "short_attention", None)
    whole(x).sum().backward()
    torch.jit.trace(layer, x)


def next_functions(out):
    """The autograd nodes that lead to ``out``."""
    nodes, seen = [out.grad_fn], []
    while nodes:
        node = nodes.pop()
        seen.append(node)
        nodes += [following for following, _ in node.next_functions if following is not None]
    return seen
