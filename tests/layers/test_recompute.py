"""Activation checkpointing changes what is kept, and not one bit of what is computed."""

import pytest
import torch

from dinov2.layers.block import Block
from dinov2.models.vision_transformer import DinoVisionTransformer

MODES = ("selective", "full")


def build(mode, *, drop_path=0.3, chunks=0, **options):
    torch.manual_seed(0)
    model = DinoVisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=24,
        depth=4,
        num_heads=3,
        drop_path_rate=drop_path,
        drop_path_uniform=True,
        init_values=0.5,
        block_chunks=chunks,
        **options,
    )
    for module in model.modules():
        if isinstance(module, Block):
            module.recompute = mode
    return model.train()


def crops():
    generator = torch.Generator().manual_seed(1)
    sizes = ((6, 32), (10, 16))
    return [torch.randn(count, 3, side, side, generator=generator) for count, side in sizes]


def packed(model):
    outputs = model(crops(), masks=None, is_training=True)
    return sum(part["x_norm_clstoken"].sin().sum() + part["x_norm_patchtokens"].sum() for part in outputs)


def single(model):
    return model(crops()[0], is_training=True)["x_norm_clstoken"].sin().sum()


def listed(model):
    """A list of batches through one block, which packs them itself."""
    tokens = [model.prepare_tokens_with_masks(x) for x in crops()]
    return sum(x.sin().sum() for x in model.blocks[0](tokens))


def run(forward, mode, **options):
    """Loss, gradients, and the next random number after the step."""
    model = build(mode, **options)
    torch.manual_seed(2)
    loss = forward(model)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss, gradients, torch.rand(3), model


def assert_equal(one, other):
    assert torch.equal(one[0], other[0])
    assert one[1].keys() == other[1].keys()
    assert all(torch.equal(gradient, other[1][name]) for name, gradient in one[1].items())
    assert torch.equal(one[2], other[2])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("forward", "options"),
    [
        (packed, {}),
        (packed, {"drop_path": 0.0}),
        (packed, {"chunks": 2}),
        (packed, {"ffn_layer": "swiglufused", "num_register_tokens": 2}),
        (single, {}),
        (single, {"drop_path": 0.05}),
        (listed, {}),
    ],
    ids=["packed", "no-drop-path", "chunked", "swiglu-registers", "single", "masked-samples", "list"],
)
def test_losses_and_gradients_are_the_same_to_the_bit(forward, options, mode):
    expected, got = run(forward, "none", **options), run(forward, mode, **options)
    assert_equal(expected, got)
    assert sum(float(gradient.abs().sum()) for gradient in got[1].values()) > 0
    assert list(expected[3].state_dict()) == list(got[3].state_dict())


@pytest.mark.parametrize("mode", MODES)
def test_under_autocast_too(mode):
    def under_autocast(model):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return packed(model)

    assert_equal(run(under_autocast, "none"), run(under_autocast, mode))


def kept_bytes(mode):
    """Bytes of distinct tensors that are kept from the forward pass for the backward pass of the blocks."""
    model = build(mode, drop_path=0.0)
    tokens = model.prepare_tokens_with_masks(crops()[0]).detach().requires_grad_()
    own = {parameter.data_ptr() for parameter in model.parameters()}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        x = tokens
        for block in model.blocks:
            x = block(x)
    return sum(size for size, _ in kept.values()), tokens.nbytes


def test_full_keeps_the_input_of_every_block_alone():
    everything, _ = kept_bytes("none")
    inputs, size = kept_bytes("full")
    assert inputs == 4 * size
    assert everything > 10 * inputs


def test_blocks_run_once_more_in_the_backward_pass_and_not_without_gradients():
    counts = {}
    for mode in ("none", *MODES):
        model = build(mode)
        calls = counts.setdefault(mode, [])
        model.blocks[1].norm1.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        with torch.no_grad():
            packed(model)
        assert len(calls) == 1
        packed(model).backward()
    assert {mode: len(calls) for mode, calls in counts.items()} == {"none": 2, "selective": 3, "full": 3}


def test_selective_does_not_compute_products_and_attention_again():
    from torch.utils.flop_counter import FlopCounterMode

    flops = {}
    for mode in ("none", *MODES):
        model = build(mode, drop_path=0.0)
        loss = packed(model)
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        flops[mode] = counter.get_total_flops()
    assert flops["selective"] == flops["none"]
    # Half as much again, but for the last product of a block, whose result nothing needs.
    assert 1.2 * flops["none"] < flops["full"] < 1.4 * flops["none"]
