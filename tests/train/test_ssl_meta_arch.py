"""The networks and the objective where recorded cases do not reach: terms that are off, precision, EMA."""

import copy

import pytest
import torch

from dinov2.errors import ConfigError
from dinov2.fsdp import ShardedGradScaler
from dinov2.train import SSLMetaArch
from dinov2.train.input import build_collate, build_data_loader, build_dataset
from dinov2.train.optimizer import build_optimizer, clip_gradients
from dinov2.train.precision import Precision, cpu_has_bf16, effective_dtype
from dinov2.train.schedules import ScheduleValues
from dinov2.train.train import train_step
from dinov2.utils.seeding import derive_seed, seed_everything

VALUES = ScheduleValues(lr=1e-3, weight_decay=0.04, momentum=0.9, teacher_temp=0.05, last_layer_lr=1e-3)


def make(cfg):
    seed_everything(0)
    model = SSLMetaArch(cfg)
    model.prepare_for_distributed_training()
    model.train()
    return model


def make_batch(cfg):
    seed_everything(1)
    dataset = build_dataset(cfg)
    return build_collate(cfg)([dataset[index] for index in range(cfg.train.batch_size_per_gpu)])


@pytest.mark.parametrize(
    ("overrides", "terms"),
    [
        (["dino.loss_weight=0"], {"koleo_loss", "ibot_loss"}),
        (["dino.loss_weight=0", "ibot.separate_head=true"], {"koleo_loss", "ibot_loss"}),
        (["ibot.loss_weight=0"], {"dino_local_crops_loss", "dino_global_crops_loss", "koleo_loss"}),
        (["dino.koleo_loss_weight=0"], {"dino_local_crops_loss", "dino_global_crops_loss", "ibot_loss"}),
        (["crops.local_crops_number=0"], {"dino_global_crops_loss", "koleo_loss", "ibot_loss"}),
        (
            ["ibot.mask_sample_probability=0"],
            {"dino_local_crops_loss", "dino_global_crops_loss", "koleo_loss", "ibot_loss"},
        ),
    ],
    ids=["no-dino", "no-dino-separate", "no-ibot", "no-koleo", "no-local-crops", "no-masks"],
)
@pytest.mark.parametrize("centering", ["centering", "sinkhorn_knopp"])
def test_every_term_is_optional(tiny, overrides, terms, centering):
    cfg = tiny.resolve(*overrides, f"train.centering={centering}")
    model = make(cfg)
    optimizer = build_optimizer(cfg, model.get_params_groups())
    batch = make_batch(cfg)
    for _ in range(2):
        result = train_step(model, optimizer, batch, VALUES, clip_grad=3.0)
    assert result.losses.keys() == terms | {"total_loss"}
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    if "ibot.mask_sample_probability=0" in overrides:
        assert result.losses["ibot_loss"] == 0.0


@pytest.mark.parametrize("centering", ["centering", "sinkhorn_knopp"])
def test_repeating_one_batch_lowers_the_loss(tiny, centering):
    cfg = tiny.resolve(f"train.centering={centering}", "student.drop_path_rate=0", "dino.koleo_loss_weight=0")
    model = make(cfg)
    optimizer = build_optimizer(cfg, model.get_params_groups())
    batch = make_batch(cfg)
    totals = [
        train_step(model, optimizer, batch, VALUES, clip_grad=3.0).losses["total_loss"] for _ in range(40)
    ]
    assert min(totals[-5:]) < 0.95 * totals[0]


def test_masks_change_the_student_and_not_the_teacher(tiny):
    cfg = tiny.resolve("student.drop_path_rate=0")
    model = make(cfg)
    images = make_batch(cfg)
    with torch.no_grad():
        masked = model.student["backbone"](
            images["collated_global_crops"], masks=images["collated_masks"], is_training=True
        )["x_norm_patchtokens"]
        plain = model.student["backbone"](images["collated_global_crops"], is_training=True)[
            "x_norm_patchtokens"
        ]
    changed = (masked - plain).abs().amax(dim=-1) > 1e-4
    has_masks = images["collated_masks"].any(dim=1)
    assert changed[has_masks].any(dim=1).all()
    assert not changed[~has_masks].any()


def test_teacher_follows_by_the_momentum(tiny):
    model = make(tiny.resolve())
    with torch.no_grad():
        for parameter in model.student.parameters():
            parameter.add_(torch.randn_like(parameter))
    before = copy.deepcopy(model.teacher.state_dict())
    model.update_teacher(0.75)
    student = model.student.state_dict()
    for name, tensor in model.teacher.state_dict().items():
        torch.testing.assert_close(tensor, 0.75 * before[name] + 0.25 * student[name])


def test_modes_and_trainable_parameters(tiny):
    model = make(tiny.resolve())
    assert model.student.training and not model.teacher.training
    assert not model.eval().student.training
    assert model.train(True).student.training and not model.teacher.training
    assert not any(parameter.requires_grad for parameter in model.teacher.parameters())
    with pytest.raises(NotImplementedError, match="forward_backward"):
        model(None)


def test_last_layer_stands_still_while_its_learning_rate_is_zero(tiny):
    cfg = tiny.resolve()
    model = make(cfg)
    optimizer = build_optimizer(cfg, model.get_params_groups())
    before = copy.deepcopy(model.student.state_dict())
    frozen = ScheduleValues(lr=1e-2, weight_decay=0.04, momentum=0.9, teacher_temp=0.05, last_layer_lr=0.0)
    train_step(model, optimizer, make_batch(cfg), frozen, clip_grad=None)
    after = model.student.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert "dino_head.mlp.0.weight" in moved
    assert not any("last_layer" in name for name in moved)


def test_batch_normalisation_is_refused(tiny):
    model = SSLMetaArch(tiny.resolve())
    model.student["dino_head"].mlp.insert(1, torch.nn.BatchNorm1d(32))
    with pytest.raises(ConfigError, match="batch normalisation"):
        model.prepare_for_distributed_training()


@pytest.mark.parametrize("centering", ["centering", "sinkhorn_knopp"])
def test_bf16_trains_and_stays_close_to_fp32(tiny, centering):
    overrides = [f"train.centering={centering}", "student.drop_path_rate=0"]
    bf16 = [
        f"compute_precision.{network}.{part}.mixed_precision.param_dtype=bf16"
        for network in ("student", "teacher")
        for part in ("backbone", "dino_head", "ibot_head")
    ]
    losses = {}
    for name, extra in (("fp32", []), ("bf16", bf16)):
        cfg = tiny.resolve(*overrides, *extra)
        model = make(cfg)
        optimizer = build_optimizer(cfg, model.get_params_groups())
        losses[name] = train_step(model, optimizer, make_batch(cfg), VALUES, clip_grad=3.0).losses
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert losses["bf16"]["total_loss"] == pytest.approx(losses["fp32"]["total_loss"], rel=2e-2)
    assert losses["bf16"]["total_loss"] != losses["fp32"]["total_loss"]


def test_student_and_teacher_may_differ_in_precision(tiny):
    cfg = tiny.resolve("compute_precision.student.backbone.mixed_precision.param_dtype=bf16")
    model = make(cfg)
    assert model.precision.input_dtype == torch.float32
    loader = build_data_loader(cfg, build_dataset(cfg), start_iteration=0, dtype=model.precision.input_dtype)
    optimizer = build_optimizer(cfg, model.get_params_groups())
    train_step(model, optimizer, next(iter(loader)), VALUES, clip_grad=3.0)


def test_fp16_on_a_cpu_says_what_it_runs_in(tiny):
    fp16 = tiny.resolve("compute_precision.student.backbone.mixed_precision.param_dtype=fp16")
    precision = Precision(fp16.compute_precision, torch.device("cpu"))
    expected = torch.bfloat16 if cpu_has_bf16() else torch.float32
    assert precision.dtypes["student", "backbone"] == expected
    assert str(expected).removeprefix("torch.") in precision.describe()
    assert "configured: fp16 and fp32" in precision.describe()
    assert not precision.needs_grad_scaler
    assert effective_dtype("fp16", torch.device("cuda")) == torch.float16


def test_derived_seeds_do_not_collide():
    seeds = {derive_seed(seed, rank, step) for seed in range(4) for rank in range(8) for step in range(64)}
    assert len(seeds) == 4 * 8 * 64


def test_a_step_skipped_by_the_gradient_scaler_moves_nothing(tiny):
    cfg = tiny.resolve()
    model = make(cfg)
    model.fp16_scaler = ShardedGradScaler("cpu", init_scale=1e38)  # gradients overflow float32
    optimizer = build_optimizer(cfg, model.get_params_groups())
    before = copy.deepcopy(model.state_dict())
    skipped = train_step(model, optimizer, make_batch(cfg), VALUES, clip_grad=3.0)
    assert not skipped.stepped
    for network in ("student", "teacher"):
        for name, tensor in getattr(model, network).state_dict().items():
            assert torch.equal(tensor, before[f"{network}.{name}"]), name
    assert model.fp16_scaler.get_scale() < 1e38

    model.fp16_scaler = ShardedGradScaler("cpu", init_scale=1024.0)
    assert train_step(model, optimizer, make_batch(cfg), VALUES, clip_grad=3.0).stepped


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_step_with_a_gradient_that_is_not_finite_moves_nothing(tiny, value):
    cfg = tiny.resolve()
    model = make(cfg)
    optimizer = build_optimizer(cfg, model.get_params_groups())
    before = copy.deepcopy(model.state_dict())
    model.student["dino_head"].mlp[0].bias.register_hook(lambda gradient: torch.full_like(gradient, value))
    result = train_step(model, optimizer, make_batch(cfg), VALUES, clip_grad=3.0)
    assert f"dino_head {value}" in result.problem and "a gradient norm is not finite" in result.problem
    assert not result.stepped
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_largest_mask_is_half_the_patches(tiny):
    # 98 px at patch 14 are 49 patches; DINOv2 rounds twice on the way and arrives at 21.
    cfg = tiny.resolve("crops.global_crops_size=98", "student.patch_size=14", "crops.local_crops_size=28")
    assert build_collate(cfg).keywords["mask_generator"].max_num_patches == 24.5


def test_crops_reach_the_network_in_its_own_precision(tiny):
    cfg = tiny.resolve()
    loader = build_data_loader(cfg, build_dataset(cfg), start_iteration=0, dtype=torch.bfloat16)
    batch = next(iter(loader))
    assert batch["collated_global_crops"].dtype == torch.bfloat16
    assert batch["collated_global_crops"].shape == (8, 3, 32, 32)


def test_clipping_is_by_submodule(tiny):
    model = make(tiny.resolve())
    for parameter in model.student.parameters():
        parameter.grad = torch.ones_like(parameter)
    norms = clip_gradients(model.student, max_norm=0.5)
    for name, module in model.student.items():
        count = sum(parameter.numel() for parameter in module.parameters())
        assert norms[name].item() == pytest.approx(count**0.5)
        clipped = sum(parameter.grad.square().sum() for parameter in module.parameters()).sqrt()
        assert clipped.item() == pytest.approx(0.5, rel=1e-4)
