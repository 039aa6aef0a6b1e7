"""The backbone, or parts of it, standing still for a while or for good, and its rising learning rate."""

import copy
import shutil

import pytest
import torch

from dinov2.errors import ConfigError
from dinov2.fsdp import ShardedGradScaler
from dinov2.train import SSLMetaArch
from dinov2.train.freezing import BackboneStart, freeze_first_blocks
from dinov2.train.optimizer import apply_optim_scheduler, build_optimizer
from dinov2.train.schedules import build_schedulers
from dinov2.train.train import train_step
from tests.checkpoints import read_state
from tests.train.test_ssl_meta_arch import VALUES, make_batch

WHOLE_RUN = ("optim.epochs=3", "checkpointing.period=1", "checkpointing.max_to_keep=9", "optim.base_lr=0.1")
FROZEN = 4


def backbone(state, network="student"):
    prefix = f"{network}.backbone."
    return {name: tensor for name, tensor in state["model"].items() if name.startswith(prefix)}


def differing(one, other):
    assert one.keys() == other.keys()
    return {name for name in one if not torch.equal(one[name], other[name])}


def prepared(cfg):
    model = SSLMetaArch(cfg)
    model.prepare_for_distributed_training()
    return model.train()


@pytest.fixture(scope="module")
def frozen_run(tmp_path_factory, tile_folder):
    """A run of 9 iterations, the backbone frozen before iteration 4, a checkpoint after each iteration."""
    from tests.train.conftest import TinyRun

    folder = tmp_path_factory.mktemp("frozen")
    tiny = TinyRun(folder, tile_folder)
    tiny.start(folder / "run", *WHOLE_RUN, f"train.freeze_backbone_iterations={FROZEN}")
    return folder / "run"


def state_after(run, iteration):
    name = "model_final" if iteration == 8 else f"model_{iteration:07d}"
    return read_state(run / name)


def test_the_backbone_stands_still_and_the_heads_learn(frozen_run):
    first, last_frozen, later = (state_after(frozen_run, i) for i in (0, FROZEN - 1, FROZEN + 1))
    assert not differing(backbone(first), backbone(last_frozen))
    assert len(differing(backbone(last_frozen), backbone(later))) > 20
    heads = [name for name in first["model"] if name.startswith("student.dino_head.mlp")]
    assert all(not torch.equal(first["model"][name], last_frozen["model"][name]) for name in heads)


def test_the_teachers_backbone_stands_still_too(frozen_run):
    first, last_frozen, later = (state_after(frozen_run, i) for i in (0, FROZEN - 1, FROZEN + 2))
    assert not differing(backbone(first, "teacher"), backbone(last_frozen, "teacher"))
    assert differing(backbone(first, "teacher"), backbone(later, "teacher"))
    moved = differing(first["model"], last_frozen["model"])
    assert "teacher.dino_head.mlp.0.weight" in moved


def test_a_teacher_that_was_loaded_separately_is_not_drawn_to_a_frozen_student(tiny):
    cfg = tiny.resolve("train.freeze_backbone_iterations=2")
    model = prepared(cfg)
    with torch.no_grad():
        for parameter in model.teacher.parameters():
            parameter.add_(torch.randn_like(parameter))
    before = copy.deepcopy(model.teacher.state_dict())
    start = BackboneStart(cfg, model.student["backbone"])
    start.enter(1, VALUES)
    model.update_teacher(0.5)
    moved = differing(before, model.teacher.state_dict())
    assert moved and all(name.startswith("dino_head.") for name in moved)
    start.enter(2, VALUES)
    model.update_teacher(0.5)
    assert "backbone.blocks.0.attn.qkv.weight" in differing(before, model.teacher.state_dict())


def test_the_gradient_scaler_and_clipping_accept_a_frozen_backbone(tiny):
    cfg = tiny.resolve("train.freeze_backbone_iterations=1")
    model = prepared(cfg)
    model.fp16_scaler = ShardedGradScaler("cpu", init_scale=1024.0)
    optimizer = build_optimizer(cfg, model.get_params_groups())
    start = BackboneStart(cfg, model.student["backbone"])
    before = copy.deepcopy(model.student.state_dict())
    norms = []
    for iteration in range(3):
        result = train_step(model, optimizer, make_batch(cfg), start.enter(iteration, VALUES), clip_grad=3.0)
        assert result.stepped
        norms.append(result.grad_norms["backbone"])
        moved = {name.split(".")[0] for name in differing(before, model.student.state_dict())}
        # At the release itself the learning rate still is 0.
        assert moved == ({"dino_head"} if iteration < 2 else {"dino_head", "backbone"})
    assert norms[0] == 0 and min(norms[1:]) > 0


def test_adamw_keeps_no_state_for_what_is_frozen(frozen_run):
    frozen, free = state_after(frozen_run, FROZEN - 1)["optimizer"], state_after(frozen_run, 8)["optimizer"]
    in_backbone = [name for group in free["param_groups"] if group["is_backbone"] for name in group["params"]]
    assert in_backbone and not set(in_backbone) & frozen["state"].keys()
    assert set(in_backbone) <= free["state"].keys()
    # The bias correction of Adam's moments counts from the release.
    assert {free["state"][name]["step"].item() for name in in_backbone} == {9 - FROZEN}


@pytest.mark.parametrize("done", [2, FROZEN, FROZEN + 2], ids=["before", "at", "after"])
def test_a_resume_around_the_release_equals_an_uninterrupted_run(tiny, tmp_path, frozen_run, done):
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    name = f"model_{done - 1:07d}"
    shutil.copytree(frozen_run / name, resumed / name)
    tiny.start(resumed, *WHOLE_RUN, f"train.freeze_backbone_iterations={FROZEN}")
    expected, got = state_after(frozen_run, 8), state_after(resumed, 8)
    assert not differing(expected["model"], got["model"])
    assert expected["optimizer"]["state"].keys() == got["optimizer"]["state"].keys()


def test_the_learning_rate_of_the_backbone_rises_from_0_over_the_warm_up(tiny):
    cfg = tiny.resolve(*WHOLE_RUN, f"train.freeze_backbone_iterations={FROZEN}", "optim.warmup_epochs=1")
    model = prepared(cfg)
    optimizer = build_optimizer(cfg, model.get_params_groups())
    start, schedules = BackboneStart(cfg, model.student["backbone"]), build_schedulers(cfg)
    factors = []
    for iteration in (0, 4, 5, 6, 7, 8, 5):  # in any order: nothing depends on what came before
        values = start.enter(iteration, schedules.at(iteration))
        factors.append(values.backbone_lr_factor)
        apply_optim_scheduler(
            optimizer,
            values.lr,
            values.weight_decay,
            values.last_layer_lr,
            backbone_lr_factor=values.backbone_lr_factor,
        )
        for group in optimizer.param_groups:
            factor = values.backbone_lr_factor if group["is_backbone"] else 1.0
            assert group["lr"] == pytest.approx(values.lr * group["lr_multiplier"] * factor)
        assert all(p.requires_grad == (iteration >= FROZEN) for p in model.student["backbone"].parameters())
        assert all(p.requires_grad for p in model.student["dino_head"].parameters())
    assert factors == pytest.approx([0, 0, 1 / 3, 2 / 3, 1, 1, 1 / 3])


def test_without_freezing_the_factor_is_1_throughout(tiny):
    cfg = tiny.resolve()
    start = BackboneStart(cfg, prepared(cfg).student["backbone"])
    assert {start.lr_factor(iteration) for iteration in range(6)} == {1.0}


def test_without_a_warm_up_the_factor_is_1_from_the_release_on(tiny):
    cfg = tiny.resolve("train.freeze_backbone_iterations=2", "optim.warmup_epochs=0")
    start = BackboneStart(cfg, prepared(cfg).student["backbone"])
    assert [start.lr_factor(iteration) for iteration in range(4)] == [0.0, 0.0, 1.0, 1.0]


def test_the_backbone_multiplier_is_in_its_groups_and_in_no_other(tiny):
    plain = prepared(tiny.resolve("optim.layerwise_decay=0.5")).get_params_groups()
    scaled = prepared(
        tiny.resolve("optim.layerwise_decay=0.5", "optim.backbone_lr_mult=0.1")
    ).get_params_groups()
    assert {group["is_backbone"] for group in plain} == {True, False}
    for one, other in zip(plain, scaled, strict=True):
        factor = 0.1 if one["is_backbone"] else 1.0
        assert other["lr_multiplier"] == pytest.approx(factor * one["lr_multiplier"], rel=1e-12)
        assert other["wd_multiplier"] == one["wd_multiplier"]


@pytest.mark.parametrize("chunks", [0, 2])
def test_frozen_blocks_keep_their_values_and_the_others_learn(tiny, tmp_path, chunks):
    layout = (f"student.block_chunks={chunks}", "student.num_register_tokens=2")
    tiny.start(tmp_path / "run", *WHOLE_RUN, *layout, "train.freeze_blocks=1")
    first, last = state_after(tmp_path / "run", 0), state_after(tmp_path / "run", 8)
    moved = {name.removeprefix("student.backbone.") for name in differing(backbone(first), backbone(last))}
    second = "blocks.1.1." if chunks else "blocks.1."
    assert {name for name in moved if not name.startswith(second)} == {
        "norm.weight",
        "norm.bias",
        "mask_token",
    }
    assert any(name.startswith(second) for name in moved)
    moved = differing(backbone(first, "teacher"), backbone(last, "teacher"))
    assert moved and all(second in name or ".norm." in name or "mask_token" in name for name in moved)


def test_a_learned_mask_token_is_frozen_with_the_other_tokens(tiny):
    network = prepared(tiny.resolve()).student["backbone"]
    with torch.no_grad():
        network.mask_token.fill_(0.5)
    freeze_first_blocks(network, 2)
    assert {name for name, p in network.named_parameters() if p.requires_grad} == {"norm.weight", "norm.bias"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.freeze_backbone_iterations=6"], "6 is not shorter than the 6 iterations of optim.epochs 2"),
        (["train.freeze_blocks=3"], "train.freeze_blocks is 3, but vit_tiny has 2 blocks"),
    ],
)
def test_what_leaves_nothing_to_learn_is_refused_before_anything_is_built(tiny, overrides, message):
    with pytest.raises(ConfigError, match=message):
        tiny.resolve(*overrides)


def test_a_run_stated_in_images_is_checked_once_its_length_is_known(tiny, tmp_path):
    with pytest.raises(
        ConfigError, match="train.freeze_backbone_iterations 4 is not shorter than the run of 4"
    ):
        tiny.start(tmp_path, "optim.max_images=14", "train.freeze_backbone_iterations=4")


def test_more_blocks_than_there_are_is_refused_where_the_config_cannot_know(tiny):
    with pytest.raises(ConfigError, match="the backbone has only 2 blocks"):
        freeze_first_blocks(prepared(tiny.resolve()).student["backbone"], 3)
