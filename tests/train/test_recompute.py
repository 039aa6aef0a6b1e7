"""Activation checkpointing as the config asks for it, in whole training steps."""

import pytest
import torch

from dinov2.errors import ConfigError
from dinov2.train import SSLMetaArch
from dinov2.train.input import build_data_loader, build_dataset, in_steps
from dinov2.train.optimizer import build_optimizer
from dinov2.train.recompute import recompute_activations
from dinov2.train.schedules import ScheduleValues
from dinov2.train.step import train_step
from dinov2.utils.seeding import seed_everything

VALUES = ScheduleValues(lr=1e-3, weight_decay=0.04, momentum=0.9, teacher_temp=0.05, last_layer_lr=1e-3)
BF16 = [
    f"compute_precision.{network}.{part}.mixed_precision.param_dtype=bf16"
    for network in ("student", "teacher")
    for part in ("backbone", "dino_head", "ibot_head")
]


def two_steps(tiny, mode, *overrides):
    cfg = tiny.resolve(f"train.activation_checkpointing={mode}", "optim.accumulate_steps=2", *overrides)
    seed_everything(0)
    model = SSLMetaArch(cfg)
    model.prepare_for_distributed_training()
    model.train()
    optimizer = build_optimizer(cfg, model.get_params_groups())
    steps = in_steps(build_data_loader(cfg, build_dataset(cfg), 0, model.precision.input_dtype), 2)
    results = [
        train_step(model, optimizer, next(steps), VALUES, 3.0, seed=lambda number: seed_everything(number))
        for _ in range(2)
    ]
    assert {block.recompute for block in model.student["backbone"].blocks} == {mode}
    assert {block.recompute for block in model.teacher["backbone"].blocks} == {"none"}
    return results, model.state_dict()


@pytest.mark.parametrize("overrides", [[], BF16, ["train.freeze_blocks=1"]], ids=["fp32", "bf16", "frozen"])
def test_steps_are_the_same_to_the_bit(tiny, overrides):
    expected, expected_state = two_steps(tiny, "none", *overrides)
    for mode in ("selective", "full"):
        got, state = two_steps(tiny, mode, *overrides)
        assert [(r.losses, r.grad_norms) for r in got] == [(r.losses, r.grad_norms) for r in expected]
        assert list(state) == list(expected_state)
        assert all(torch.equal(tensor, expected_state[name]) for name, tensor in state.items())


def test_adapters_recompute_too(tiny):
    pytest.importorskip("peft")
    test_steps_are_the_same_to_the_bit(tiny, ["student.lora_rank=2"])


def test_a_backbone_of_other_blocks_is_refused():
    with pytest.raises(ConfigError, match="activation_checkpointing is 'full', but Linear has none"):
        recompute_activations(torch.nn.Linear(2, 2), "full")
    recompute_activations(torch.nn.Linear(2, 2), "none")
