"""Mlp and the gated feed-forwards against timm and transformers, their sizes and their dropout."""

import pytest
import timm.layers
import torch
from transformers import Dinov2Config
from transformers.models.dinov2.modeling_dinov2 import Dinov2SwiGLUFFN

from dinov2.layers import Mlp, SwiGLUFFN, SwiGLUFFNAligned, SwiGLUFFNFused


def test_mlp_equals_timm():
    torch.manual_seed(0)
    ours, theirs = Mlp(12, 20, 8), timm.layers.Mlp(12, 20, 8)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 5, 12)
    torch.testing.assert_close(ours(x), theirs(x))


def test_fused_swiglu_equals_transformers():
    torch.manual_seed(0)
    ours, theirs = SwiGLUFFNFused(12, 48), Dinov2SwiGLUFFN(Dinov2Config(hidden_size=12, mlp_ratio=4))
    halves = zip(("gate_proj", "up_proj"), ours.w12.weight.chunk(2), ours.w12.bias.chunk(2), strict=True)
    for name, weight, bias in halves:
        theirs.get_submodule(name).load_state_dict({"weight": weight, "bias": bias})
    theirs.down_proj.load_state_dict(ours.w3.state_dict())
    x = torch.randn(3, 5, 12)
    torch.testing.assert_close(ours(x), theirs(x))


def test_aligned_equals_joint_matrix():
    torch.manual_seed(0)
    joint = SwiGLUFFN(12, 24)
    aligned = SwiGLUFFNAligned(12, 36, align_to=8)
    w1, w2 = joint.w12.weight.chunk(2)
    b1, b2 = joint.w12.bias.chunk(2)
    parts = {"w1.weight": w1, "w1.bias": b1, "w2.weight": w2, "w2.bias": b2}
    aligned.load_state_dict({**parts, "w3.weight": joint.w3.weight, "w3.bias": joint.w3.bias})
    x = torch.randn(3, 5, 12)
    torch.testing.assert_close(aligned(x), joint(x))


@pytest.mark.parametrize(("width", "hidden"), [(384, 1024), (768, 2048), (1024, 2736), (1536, 4096)])
def test_hidden_sizes(width, hidden):
    with torch.device("meta"):
        fused = SwiGLUFFNFused(width, 4 * width)
        aligned = SwiGLUFFNAligned(width, 4 * width, align_to=64)
    assert fused.w12.out_features == 2 * hidden and fused.w3.in_features == hidden
    assert aligned.w1.out_features % 64 == 0 and 0 <= aligned.w1.out_features - hidden < 64


@pytest.mark.parametrize("ffn", [Mlp, SwiGLUFFN, SwiGLUFFNFused, SwiGLUFFNAligned])
def test_dropout_is_honoured_in_training(ffn):
    torch.manual_seed(0)
    module = ffn(12, 48, drop=0.5)
    out = module(torch.randn(400, 12))
    assert (out == 0).float().mean().item() == pytest.approx(0.5, abs=0.05)
    x = torch.randn(4, 12)
    without = ffn(12, 48).eval()
    without.load_state_dict(module.state_dict())
    assert torch.equal(module.eval()(x), without(x))


@pytest.mark.parametrize("ffn", [Mlp, SwiGLUFFN, SwiGLUFFNFused, SwiGLUFFNAligned])
def test_bias_and_default_sizes(ffn):
    module = ffn(16, bias=False)
    assert all("bias" not in name for name in module.state_dict())
    assert module(torch.randn(2, 16)).shape == (2, 16)
