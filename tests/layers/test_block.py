"""Blocks against PyTorch's encoder layer, lists against single batches, and stochastic depth."""

import pytest
import torch
from torch import nn

import dinov2.layers.block as block_module
from dinov2.layers import CausalAttentionBlock, LayerScale, MemEffAttention, NestedTensorBlock
from dinov2.layers.block import (
    Block,
    add_residual,
    drop_add_residual_stochastic_depth,
    drop_add_residual_stochastic_depth_list,
    get_branges_scales,
)

DIM = 24


def _block(block_class=NestedTensorBlock, **options):
    torch.manual_seed(0)
    options = {"qkv_bias": True, "init_values": 0.5, "attn_class": MemEffAttention, **options}
    block = block_class(DIM, num_heads=3, **options)
    for parameter in block.parameters():  # away from ones and zeros, so that a skipped term shows
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return block


def _batches():
    torch.manual_seed(1)
    return [torch.randn(4, 7, DIM), torch.randn(10, 3, DIM)]


@pytest.mark.parametrize("block_class", [Block, NestedTensorBlock])
def test_equals_torch_encoder_layer(block_class):
    ours = _block(block_class, init_values=None).eval()
    theirs = nn.TransformerEncoderLayer(
        DIM, 3, 4 * DIM, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    names = {
        "self_attn.in_proj_": "attn.qkv.",
        "self_attn.out_proj.": "attn.proj.",
        "linear1.": "mlp.fc1.",
        "linear2.": "mlp.fc2.",
    }
    state = {}
    for name in theirs.state_dict():
        source = name
        for theirs_prefix, ours_prefix in names.items():
            source = source.replace(theirs_prefix, ours_prefix)
        state[name] = ours.state_dict()[source]
    theirs.load_state_dict(state)
    x = torch.randn(2, 7, DIM)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attn_class", [MemEffAttention, block_module.Attention])
def test_list_equals_separate_with_gradients(attn_class):
    block = _block(attn_class=attn_class)
    batches = _batches()

    def run(outputs):
        loss = sum(out.square().sum() for out in outputs)
        return [*outputs, *torch.autograd.grad(loss, list(block.parameters()))]

    wants = run([block(x) for x in batches])
    for got, want in zip(run(block(batches)), wants, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_each_layer_scale_is_checked_by_itself():
    block = _block()
    block.ls1 = nn.Identity()
    batches = _batches()
    for got, x in zip(block(batches), batches, strict=True):
        torch.testing.assert_close(got, block(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("batch", "rate", "kept"), [(10, 0.3, 7), (2, 0.3, 1), (1, 0.9, 1), (8, 0.4, 4)])
def test_subset_size_and_scale(batch, rate, kept):
    rows, scale = get_branges_scales(torch.empty(batch, 3, DIM), rate)
    assert len(rows) == kept == len(rows.unique()) and rows.max() < batch
    assert scale == pytest.approx(batch / kept)


def test_add_residual_by_hand():
    x = torch.zeros(3, 1, 2)
    got = add_residual(x, torch.tensor([2, 0]), torch.ones(2, 1, 2), 1.5, torch.tensor([1.0, 10.0]))
    assert got.flatten(1).tolist() == [[1.5, 15.0], [0.0, 0.0], [1.5, 15.0]]
    assert not x.any()


def test_dropped_share_and_expectation_of_one_batch():
    torch.manual_seed(0)
    x = torch.zeros(10, 2, 3)
    draws = torch.stack(
        [drop_add_residual_stochastic_depth(x, torch.ones_like, sample_drop_ratio=0.33) for _ in range(2000)]
    )
    per_sample = draws[:, :, 0, 0]
    assert ((per_sample > 0).sum(1) == 6).all()  # int(10 * 0.67) of 10: the share dropped is 0.4, not 0.33
    # Standard error of a mean over 2000 draws of a 0 / (10/6) variable is 0.018.
    torch.testing.assert_close(per_sample.mean(0), torch.ones(10), rtol=0, atol=0.09)
    assert torch.equal(draws, per_sample[..., None, None].expand_as(draws))


def test_dropped_share_and_expectation_of_a_list():
    torch.manual_seed(0)
    x_list = [torch.zeros(4, 2, 3), torch.zeros(10, 1, 3)]
    gamma = torch.tensor([1.0, 2.0, 3.0])

    def ones(x, attn_bias):
        assert attn_bias.shapes == ((2, 2), (6, 1)) and x.shape == (1, 10, 3)
        return torch.ones_like(x)

    totals = [torch.zeros_like(x) for x in x_list]
    for _ in range(2000):
        outputs = drop_add_residual_stochastic_depth_list(x_list, ones, 0.33, scaling_vector=gamma)
        assert [(out[:, 0, 0] > 0).sum().item() for out in outputs] == [2, 6]
        totals = [total + out / 2000 for total, out in zip(totals, outputs, strict=True)]
    for total in totals:
        torch.testing.assert_close(total, gamma.expand_as(total), rtol=0.1, atol=0.0)


def _expected(block, x, kept):
    """Two branches over the first ``kept`` samples, written out."""
    scale = len(x) / kept
    x = torch.cat([x[:kept] + scale * block.ls1(block.attn(block.norm1(x[:kept]))), x[kept:]])
    return torch.cat([x[:kept] + scale * block.ls2(block.mlp(block.norm2(x[:kept]))), x[kept:]])


@pytest.fixture
def in_order(monkeypatch):
    """Stochastic depth keeps the first samples."""
    monkeypatch.setattr(torch, "randperm", torch.arange)
    monkeypatch.setattr(torch, "rand", lambda *size, device: torch.arange(size[-1]).expand(size))


@pytest.mark.parametrize("rate", [0.05, 0.5])
def test_training_on_a_list_computes_a_subset_at_any_rate(in_order, rate):
    block = _block(drop_path=rate)
    assert isinstance(block.ls1, LayerScale)
    batches = _batches()
    wants = [_expected(block, x, int(len(x) * (1 - rate))) for x in batches]
    for got, want in zip(block(batches), wants, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_subset_gradients_on_both_paths(in_order):
    block = _block(drop_path=0.5)
    batches = [x.requires_grad_() for x in _batches()]
    leaves = [*batches, *block.parameters()]

    def gradients(outputs):
        return torch.autograd.grad(sum(out.pow(3).sum() for out in outputs), leaves)

    wants = gradients([_expected(block, x, len(x) // 2) for x in batches])
    for outputs in (block(batches), [block(x) for x in batches]):
        for got, want in zip(gradients(outputs), wants, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)


def test_small_rate_on_one_batch_masks_samples(monkeypatch):
    monkeypatch.setattr(block_module, "drop_add_residual_stochastic_depth", None)  # must not be called
    block = _block(drop_path=0.1)
    torch.manual_seed(0)
    x = torch.randn(1000, 2, DIM)
    untouched = (block(x) == x).flatten(1).all(1).float().mean().item()
    assert untouched == pytest.approx(0.1**2, abs=0.012)


def test_evaluation_drops_nothing():
    batches = _batches()
    plain, dropping = _block().eval(), _block(drop_path=0.5).eval()
    dropping.load_state_dict(plain.state_dict())
    assert torch.equal(dropping(batches[0]), plain(batches[0]))
    assert all(map(torch.equal, dropping(batches), plain(batches)))


def test_input_survives_the_subset_branches():
    block = _block(drop_path=0.5)
    batches = _batches()
    copies = [x.clone() for x in batches]
    block(batches), block(batches[0])
    assert all(map(torch.equal, batches, copies))


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_bfloat16_autocast_keeps_the_stream_in_float32(rate):
    block = _block(drop_path=rate)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = [block(_batches()[0]), *block(_batches())]
    assert all(out.dtype == torch.float32 and out.isfinite().all() for out in outputs)


class TestCausalAttentionBlock:
    def test_formula_and_causality(self):
        torch.manual_seed(0)
        block = CausalAttentionBlock(DIM, 3, ls_init_value=0.5)
        x = torch.randn(2, 7, DIM)
        y = x + 0.5 * block.attention(block.attention_norm(x), is_causal=True)
        y = y + 0.5 * block.feed_forward(block.ffn_norm(y))
        torch.testing.assert_close(block(x), y)
        changed = x.clone()
        changed[:, 4:] += 1
        torch.testing.assert_close(block(changed)[:, :4], block(x)[:, :4])
        assert not torch.allclose(block(changed)[:, 4:], block(x)[:, 4:])

    def test_submodules(self):
        block = CausalAttentionBlock(DIM, 3, dropout_prob=0.1)
        assert [name for name, _ in block.named_children()] == [
            "ls1",
            "attention_norm",
            "attention",
            "ffn_norm",
            "feed_forward",
            "ls2",
        ]
        assert isinstance(block.ls1, nn.Identity) and block.attention.attn_drop == 0.1
        block.train()
        x = torch.randn(2, 7, DIM)
        assert not torch.equal(block(x), block(x))

    def test_init_weights_standard_deviations(self):
        torch.manual_seed(0)
        block = CausalAttentionBlock(256, 8)
        block.init_weights(factor=0.5)
        stds = {
            "attention.qkv": 256**-0.5,
            "attention.proj": 0.5 * 256**-0.5,
            "feed_forward.fc1": 512**-0.5,
            "feed_forward.fc2": 0.5 * 256**-0.5,
        }
        for name, std in stds.items():
            assert block.get_submodule(name).weight.std().item() == pytest.approx(std, rel=0.02), name
