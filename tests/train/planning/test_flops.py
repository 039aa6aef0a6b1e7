"""Arithmetic: engineering's tables to their digits, and what PyTorch and fvcore count in real networks."""

from dataclasses import replace

import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from torch.utils.flop_counter import FlopCounterMode

from dinov2.layers import DINOHead
from dinov2.layers.attention import Attention
from dinov2.models.vision_transformer import vit_tiny
from dinov2.train.planning.flops import (
    forward_flops,
    head_flops,
    patch_flops,
    step_flops,
    student_forward_flops,
)
from dinov2.train.planning.workload import HeadSizes, VitSizes, Workload
from tests.train.planning.steps import SMALL, build, random_batch, resolve, workload

# GFLOP per image: 2 x 224 and 8 x 98 px, patch 14, no stochastic depth, one head of 65536 prototypes.
TABLE = {
    "vit_small": (24.5, 73.5, 52.6, 3.5, 11.6, 165.7),
    "vit_base": (92.6, 277.9, 207.1, 3.6, 12.0, 593.3),
    "vit_large": (324.0, 972.1, 732.1, 3.7, 12.3, 2044),
    "vit_giant2": (1198, 3593, 2735, 3.9, 12.8, 7542),
}
# Images per second at 790 TFLOP/s: patch 14 with drop rates 0 and 0.3, patch 16 (and 96 px) likewise.
SPEEDS = {
    "vit_small": (4768, 6161, 6355, 8189),
    "vit_base": (1331, 1761, 1770, 2337),
    "vit_large": (386, 515, 514, 684),
    "vit_giant2": (105, 140, 139, 186),
}


def planned(arch: str, patch: int = 14, drop: float = 0.0, batch: int = 64) -> Workload:
    overrides = [f"student.arch={arch}", f"student.patch_size={patch}", f"student.drop_path_rate={drop}"]
    overrides += [f"crops.local_crops_size={98 if patch == 14 else 96}"]
    overrides += ["student.ffn_layer=swiglufused"] if arch == "vit_giant2" else []
    return replace(workload(resolve(*overrides)), batch=batch)


@pytest.mark.parametrize("arch", TABLE)
def test_flops_per_image(arch):
    flops = step_flops(planned(arch))
    values = (
        flops.teacher,
        flops.student_global,
        flops.student_local,
        flops.teacher_heads,
        flops.student_heads,
        flops.model,
    )
    for value, printed in zip(values, TABLE[arch], strict=True):
        assert round(value / 1e9, 1 if printed < 1000 else 0) == printed


@pytest.mark.parametrize("arch", SPEEDS)
def test_images_per_second(arch):
    cases = ((14, 0.0), (14, 0.3), (16, 0.0), (16, 0.3))
    for (patch, drop), printed in zip(cases, SPEEDS[arch], strict=True):
        # A large batch, with which whole sequences come to the share that the table has.
        flops = step_flops(planned(arch, patch, drop, batch=100_000))
        assert 790e12 / flops.model == pytest.approx(printed, abs=0.51)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("student.drop_path_rate=0", "ibot.separate_head=true", "ibot.head_n_prototypes=512"),
        ("student.ffn_layer=swiglufused", "student.num_register_tokens=4"),
        ("student.patch_size=16", "crops.global_crops_size=64", "crops.local_crops_size=32"),
        ("train.freeze_blocks=1",),
        ("dino.loss_weight=0", "crops.local_crops_number=0"),
    ],
)
def test_a_real_step_does_what_is_calculated(overrides, monkeypatch):
    """Counted by PyTorch on the products of the real step, with attention written out as products."""
    monkeypatch.setattr(Attention, "backend", "math")
    cfg = resolve(*SMALL, "train.batch_size_per_gpu=8", *overrides)
    model = build(cfg)
    images = random_batch(cfg)
    with FlopCounterMode(display=False) as counter:
        model.backprop_loss(model.compute_losses(images, 0.07).total)
    work = workload(cfg)
    patches = work.vit.patches(work.global_pixels)
    masked = float(images["n_masked_patches"]) / (2 * work.batch * patches)
    expected = work.batch * step_flops(replace(work, masked_share=masked)).executed
    if not work.frozen_blocks:
        # A backward pass counts as two forward passes everywhere; images, though, need no gradient.
        crops = ((2, work.global_pixels), (work.local_crops, work.local_pixels))
        expected -= work.batch * sum(number * patch_flops(work.vit, pixels) for number, pixels in crops)
    assert expected == pytest.approx(counter.get_total_flops(), rel=0.02)


def fvcore_flops(module, *inputs) -> float:
    """Count with fvcore, for which a multiply-add is one, what is in the model: not the norms."""
    analysis = FlopCountAnalysis(module, inputs)
    analysis.unsupported_ops_warnings(False)
    counted = analysis.by_operator()
    return 2 * (counted.total() - counted["layer_norm"])


@pytest.mark.parametrize("patch", [14, 16])
@pytest.mark.parametrize(("ffn", "registers"), [("mlp", 0), ("swiglufused", 4)])
def test_fvcore_counts_a_forward_pass_alike(patch, ffn, registers, monkeypatch):
    monkeypatch.setattr(Attention, "backend", "math")
    pixels = 4 * patch
    vit = vit_tiny(
        patch_size=patch,
        img_size=pixels,
        depth=2,
        ffn_layer=ffn,
        num_register_tokens=registers,
        block_chunks=0,
    ).eval()
    assert fvcore_flops(vit, torch.randn(1, 3, pixels, pixels)) == forward_flops(VitSizes.of(vit), pixels)


def test_fvcore_counts_a_head_alike():
    head = DINOHead(192, 512, hidden_dim=256, bottleneck_dim=64)
    sizes = HeadSizes(width=192, hidden=256, bottleneck=64, layers=3, prototypes=512)
    assert fvcore_flops(head, torch.randn(3, 192)) == 3 * head_flops(sizes)


def test_a_third_of_the_student_is_its_forward_pass():
    for work in (planned("vit_small", drop=0.3), planned("vit_base", patch=16)):
        flops = step_flops(work)
        third = (flops.student_global + flops.student_local) / 3
        assert student_forward_flops(work) == pytest.approx(third, rel=1e-12)


def test_recomputing_whole_blocks_costs_one_more_forward_pass():
    work = planned("vit_small")
    flops = step_flops(replace(work, checkpointing="full"))
    student = flops.student_global + flops.student_local
    assert flops.recomputation == pytest.approx(student / 3, rel=0.01)
    assert flops.executed == flops.model + flops.recomputation - flops.skipped
    assert step_flops(replace(work, checkpointing="selective")).recomputation == 0


def test_frozen_blocks_are_passed_through_or_left_out():
    work = planned("vit_small")
    trained = step_flops(work).student_global
    through = step_flops(replace(work, frozen_blocks=12)).student_global
    beside = step_flops(replace(work, frozen_blocks=12, mask_token_learns=False)).student_global
    attention = 257 / (6 * 384 + 257)  # its share, which has no weights
    assert through == pytest.approx(trained * (2 + attention) / 3, rel=0.01)
    assert beside == pytest.approx(trained / 3, rel=0.001)
