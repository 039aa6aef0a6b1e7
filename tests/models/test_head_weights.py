"""Projection heads: strict loading, and sentences that name the config that would fit."""

from pathlib import Path

import pytest
import torch

from dinov2.errors import WeightsError
from dinov2.layers import DINOHead
from dinov2.models.head_weights import load_head
from dinov2.models.weight_files import open_file
from tests.models.vits import named, tiny, written

HEAD = {"in_dim": 24, "out_dim": 32, "hidden_dim": 20, "bottleneck_dim": 12, "nlayers": 3}


def test_a_head_is_loaded_strictly(tmp_path):
    source, head = DINOHead(**HEAD), DINOHead(**HEAD)
    path = written(tmp_path / "teacher_dino_head_checkpoint.pth", {"teacher_dino_head": source.state_dict()})
    load_head(head, path, "teacher_dino_head")
    assert all(torch.equal(tensor, head.state_dict()[name]) for name, tensor in source.state_dict().items())
    load_head(head, named("module.", source), "teacher_dino_head")


def test_the_report_accounts_for_every_tensor_of_the_file(tmp_path):
    head, backbone = DINOHead(**HEAD), tiny()
    network = {**named("dino_head.", head), **named("backbone.", backbone)}
    path = written(tmp_path / "teacher_checkpoint.pth", {"teacher": network})
    for source in (path, open_file(Path(path))):
        report = load_head(DINOHead(**HEAD), source, "teacher_dino_head")
        assert {*report.used, *report.unused} == {f"teacher.{name}" for name in network}
        assert len(report.used) == len(head.state_dict()) and report.source == path


def test_newer_weight_norm_names_are_taken():
    source, head = DINOHead(**HEAD), DINOHead(**HEAD)
    state = dict(source.state_dict())
    state["last_layer.parametrizations.weight.original0"] = state.pop("last_layer.weight_g")
    state["last_layer.parametrizations.weight.original1"] = state.pop("last_layer.weight_v")
    load_head(head, {"teacher_dino_head": state}, "teacher_dino_head")
    assert torch.equal(head.last_layer.weight_v, source.last_layer.weight_v)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"out_dim": 48}, "set ibot.head_n_prototypes=48 (it is 32)"),
        ({"hidden_dim": 28}, "set ibot.head_hidden_dim=28 (it is 20)"),
        ({"bottleneck_dim": 10}, "set ibot.head_bottleneck_dim=10 (it is 12)"),
        ({"nlayers": 4}, "set ibot.head_nlayers=4 (it is 3)"),
        ({"nlayers": 1}, "set ibot.head_nlayers=1 (it is 3)"),
        ({"in_dim": 30}, "backbone of width 30 (it is 24)"),
        ({"mlp_bias": False}, "mlp.0.bias"),
    ],
)
def test_a_head_that_does_not_fit_says_which_config_would(options, words):
    head = DINOHead(**HEAD)
    with pytest.raises(WeightsError) as caught:
        load_head(
            head, {"student_ibot_head": DINOHead(**{**HEAD, **options}).state_dict()}, "student_ibot_head"
        )
    assert words in str(caught.value)


def test_the_wrong_head_file_and_a_diverged_head_are_refused():
    head = DINOHead(**HEAD)
    with pytest.raises(WeightsError, match='no entry "student_dino_head", only teacher_dino_head'):
        load_head(head, {"teacher_dino_head": head.state_dict()}, "student_dino_head")
    state = {name: tensor * float("nan") for name, tensor in head.state_dict().items()}
    with pytest.raises(WeightsError, match="NaN or infinity"):
        load_head(head, {"student_dino_head": state}, "student_dino_head")
