"""Schedules and parameter groups against recorded values."""

import pytest
import torch
from torch import nn

from dinov2.layers import DINOHead
from dinov2.models import ARCHITECTURES
from dinov2.utils.param_groups import fuse_params_groups, get_params_groups_with_decay
from dinov2.utils.schedule import CosineScheduler
from tests.conftest import load_golden_json

RECORDED = load_golden_json("schedules.json")
COSINE = RECORDED["cosine"] if isinstance(RECORDED["cosine"], list) else [RECORDED["cosine"]]


@pytest.mark.parametrize("case", COSINE, ids=[str(index) for index in range(len(COSINE))])
def test_cosine_schedule_reproduces_recorded_values(case):
    schedule = CosineScheduler(**case["args"])
    got = [schedule[iteration] for iteration in range(len(case["values"]))]
    assert got == pytest.approx(case["values"], rel=RECORDED["rtol"], abs=1e-12)


def test_cosine_schedule_by_hand():
    schedule = CosineScheduler(1.0, 0.0, total_iters=10, warmup_iters=3)
    expected = [0, 0.5, 1, 1, 0.9505, 0.8117, 0.6113, 0.3887, 0.1883, 0.0495, 0.0, 0.0]
    assert [schedule[i] for i in range(12)] == pytest.approx(expected, abs=1e-4)


def test_warmup_longer_than_the_schedule_is_refused_with_numbers():
    with pytest.raises(ValueError, match="10 iterations cannot hold 2 frozen and 9 warm-up"):
        CosineScheduler(1.0, 0.0, total_iters=10, warmup_iters=9, freeze_iters=2)


def build(case) -> nn.Module:
    if case["kind"] == "backbone":
        return ARCHITECTURES[case["arch"]](**case["kwargs"])
    return DINOHead(**case["kwargs"])


@pytest.mark.parametrize(
    "case", RECORDED["param_groups"], ids=[f"{i}-{c['kind']}" for i, c in enumerate(RECORDED["param_groups"])]
)
def test_parameter_groups_reproduce_recorded_multipliers(case):
    with torch.device("meta"):
        model = build(case)
    groups = get_params_groups_with_decay(model, case["lr_decay_rate"], case["patch_embed_lr_mult"])
    table = {g["name"]: [g["lr_multiplier"], g["wd_multiplier"], g["is_last_layer"]] for g in groups}
    assert table.keys() == case["table"].keys()
    for name, expected in case["table"].items():
        assert table[name] == pytest.approx(expected, rel=RECORDED["rtol"]), name
    fused = [
        {**{key: value for key, value in group.items() if key != "params"}, "n_params": len(group["params"])}
        for group in fuse_params_groups(groups)
    ]
    assert len(fused) == len(case["fused"])
    for got, expected in zip(fused, case["fused"], strict=True):
        assert got == pytest.approx(expected, rel=RECORDED["rtol"])


def test_frozen_parameters_are_in_no_group():
    head = DINOHead(8, 16, hidden_dim=8, bottleneck_dim=4)
    head.mlp.requires_grad_(False)
    names = [group["name"] for group in get_params_groups_with_decay(head)]
    assert names == ["last_layer.weight_g", "last_layer.weight_v"]
