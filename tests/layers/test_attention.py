"""Attention against PyTorch's own module, packed batches, dropout and initialisation."""

import pytest
import torch
from torch import nn

from dinov2.errors import ConfigError
from dinov2.layers import Attention, MemEffAttention
from dinov2.layers.packing import PackedLayout


@pytest.mark.parametrize("is_causal", [False, True])
def test_equals_torch_multihead_attention(is_causal):
    torch.manual_seed(0)
    ours = Attention(24, num_heads=3, qkv_bias=True)
    theirs = nn.MultiheadAttention(24, 3, batch_first=True)
    theirs.in_proj_weight.data.copy_(ours.qkv.weight)
    theirs.in_proj_bias.data.copy_(ours.qkv.bias)
    theirs.out_proj.load_state_dict(ours.proj.state_dict())
    x = torch.randn(2, 7, 24)
    future = torch.ones(7, 7, dtype=torch.bool).triu(1) if is_causal else None
    want, _ = theirs(x, x, x, attn_mask=future, need_weights=False)
    torch.testing.assert_close(ours(x, is_causal=is_causal), want, rtol=1e-5, atol=1e-6)


def test_packed_sequences_do_not_see_each_other():
    torch.manual_seed(0)
    attention = MemEffAttention(24, num_heads=3, qkv_bias=True)
    batches = [torch.randn(2, 7, 24), torch.randn(3, 4, 24)]
    layout = PackedLayout.of(batches)
    packed = attention(layout.pack(batches), attn_bias=layout)
    for got, x in zip(layout.split(packed), batches, strict=True):
        torch.testing.assert_close(got, torch.cat([attention(row[None]) for row in x]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["auto", "math"])
def test_attention_dropout_acts_in_training_only(backend):
    torch.manual_seed(0)
    attention = MemEffAttention(24, num_heads=3, attn_drop=0.5)
    attention.backend = backend
    x = torch.randn(2, 7, 24)
    assert not torch.equal(attention(x), attention(x))
    attention.eval()
    assert torch.equal(attention(x), attention(x))


def test_heads_must_divide_the_width():
    with pytest.raises(ConfigError, match="24 cannot be shared by 5"):
        Attention(24, num_heads=5)


def test_init_weights_standard_deviations():
    torch.manual_seed(0)
    attention = Attention(256, qkv_bias=True)
    attention.init_weights(factor=0.5)
    assert attention.qkv.weight.std().item() == pytest.approx(256**-0.5, rel=0.02)
    assert attention.proj.weight.std().item() == pytest.approx(0.5 * 256**-0.5, rel=0.02)
    assert not attention.qkv.bias.any() and not attention.proj.bias.any()
    attention.init_weights(init_attn_std=0.3, init_proj_std=0.1)
    assert attention.qkv.weight.std().item() == pytest.approx(0.3, rel=0.02)
    assert attention.proj.weight.std().item() == pytest.approx(0.1, rel=0.02)
