"""Outputs of chosen tokens: those of all tokens, with less computed in the last block."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dinov2.models.vision_transformer import vit_tiny

CHOSEN = [torch.tensor([0, 10, 3, 9, 11]), torch.tensor([0, 5, 10])]  # of 2 crops of 10, 3 of 5 tokens


def model(**options):
    torch.manual_seed(0)
    options = {"patch_size": 14, "img_size": 42, "init_values": 0.5, "depth": 3, **options}
    return vit_tiny(embed_dim=24, **options)


def inputs():
    generator = torch.Generator().manual_seed(1)
    crops = [torch.randn(2, 3, 42, 42, generator=generator), torch.randn(3, 3, 28, 28, generator=generator)]
    return crops, [torch.rand(2, 9, generator=generator) > 0.5, None]


def all_tokens(vit, crops, masks):
    features = vit(crops, masks=masks, is_training=True)
    names = ("x_norm_clstoken", "x_norm_regtokens", "x_norm_patchtokens")
    return [
        torch.cat([entry[names[0]][:, None], entry[names[1]], entry[names[2]]], dim=1).flatten(0, 1)
        for entry in features
    ]


@pytest.mark.parametrize("drop", [0.0, 0.4], ids="drop path {}".format)
@pytest.mark.parametrize("options", [{}, {"block_chunks": 3}, {"ffn_layer": "swiglufused"}], ids=str)
def test_outputs_and_gradients_are_those_of_all_tokens(drop, options):
    vit = model(drop_path_rate=drop, drop_path_uniform=True, **options).train()
    found = []
    for way in (lambda: all_tokens(vit, *inputs()), lambda: vit(*inputs(), tokens=CHOSEN)):
        torch.manual_seed(2)  # the same sequences are left out
        outputs = way()
        if len(outputs[0]) != len(CHOSEN[0]):
            outputs = [tokens[rows] for tokens, rows in zip(outputs, CHOSEN, strict=True)]
        vit.zero_grad()
        sum((tokens * tokens.cos()).sum() for tokens in outputs).backward()
        found.append((outputs, {name: p.grad.clone() for name, p in vit.named_parameters()}))
    (expected, gradients), (got, got_gradients) = found
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(got_gradients[name], gradient, rtol=1e-4, atol=1e-4, msg=name)


def test_sequences_that_stochastic_depth_leaves_out_differ_from_those_it_keeps():
    """The test above would pass if nothing were ever left out."""
    vit = model(drop_path_rate=0.9, drop_path_uniform=True).train()
    torch.manual_seed(2)
    dropped = vit(*inputs(), tokens=CHOSEN)[0]
    kept = vit.eval()(*inputs(), tokens=CHOSEN)[0]
    assert (dropped - kept).abs().amax(dim=1).min() > 1e-3


def test_registers_come_before_patches():
    vit = model(num_register_tokens=2, block_chunks=0).eval()
    crops, masks = inputs()
    wanted = torch.tensor([0, 1, 3, 12, 14])  # crops of 12 tokens
    expected = all_tokens(vit, crops[:1], masks[:1])[0][wanted]
    (got,) = vit(crops[:1], masks[:1], tokens=[wanted])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputation_gives_the_same(mode):
    vit = model(drop_path_rate=0.4, drop_path_uniform=True).train()
    gradients = []
    for chosen in ("none", mode):
        for block in vit.blocks:
            block.recompute = chosen
        vit.zero_grad()
        torch.manual_seed(2)
        sum(tokens.square().sum() for tokens in vit(*inputs(), tokens=CHOSEN)).backward()
        gradients.append(vit.patch_embed.proj.weight.grad.clone())
    torch.testing.assert_close(*gradients)


def test_less_is_computed():
    vit = model().eval()
    counted = []
    for way in ({"is_training": True}, {"tokens": CHOSEN}):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            vit(*inputs(), **way)
        counted.append(counter.get_total_flops())
    left_out = 2 * 10 + 3 * 5 - sum(map(len, CHOSEN))
    assert counted[0] - counted[1] == left_out * 2 * (24 * 24 + 2 * 24 * 96)
