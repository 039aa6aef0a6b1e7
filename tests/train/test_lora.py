"""LoRA: only the factors learn, the teacher and the exports are plain ViTs with the merged weights."""

import builtins
import shutil

import pytest
import torch

from dinov2.errors import ConfigError
from dinov2.models.pretrained import load_backbone
from dinov2.train import SSLMetaArch
from dinov2.train.lora import add_adapters, has_adapters, plain_state_dict
from tests.checkpoints import read_state
from tests.train.test_training_run import load, metrics

pytest.importorskip("peft")

LORA = ("student.lora_rank=2", "student.lora_alpha=6", "optim.base_lr=0.05")
SWIGLU = ("student.ffn_layer=swiglufused", "student.block_chunks=2")


def prepared(cfg):
    model = SSLMetaArch(cfg)
    model.prepare_for_distributed_training()
    return model.train()


def stir(module):
    """Move everything that may move, so that the updates are no longer zero."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))


def by_hand(backbone):
    """The merged weights, from the tensors of the state alone: W + alpha / rank * B A."""
    state = backbone.state_dict()
    merged = {}
    for name, tensor in state.items():
        if name.endswith("base_layer.weight"):
            layer = name.removesuffix("base_layer.weight")
            update = state[f"{layer}lora_B.default.weight"] @ state[f"{layer}lora_A.default.weight"]
            merged[f"{layer}weight"] = tensor + 6 / 2 * update
        elif "lora_" not in name:
            merged[name.replace("base_layer.", "")] = tensor
    return merged


@pytest.mark.parametrize("layers", [(), SWIGLU], ids=["mlp", "swiglu"])
def test_only_the_factors_the_unlearned_mask_token_and_the_heads_learn(tiny, layers):
    cfg = tiny.resolve(*LORA, *layers)
    model = prepared(cfg)
    trained = {name: p for name, p in model.student["backbone"].named_parameters() if p.requires_grad}
    assert all("lora_" in name or name == "mask_token" for name in trained)
    hidden = (4 * 32, 4 * 32) if not layers else (2 * 88, 88)  # swiglu: 2/3 of 128, up to a multiple of 8
    sizes = [(32, 96), (32, 32), (32, hidden[0]), (hidden[1], 32)]  # of qkv, proj and the feed-forward's two
    expected = 2 * 2 * sum(fan_in + fan_out for fan_in, fan_out in sizes)  # 2 blocks, rank 2
    assert sum(p.numel() for p in trained.values()) == expected + 32
    grouped = [p for group in model.get_params_groups() if group["is_backbone"] for p in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in trained.values()}
    assert all(p.requires_grad for p in model.student["dino_head"].parameters())
    assert not has_adapters(model.teacher)


@pytest.mark.parametrize("layers", [(), SWIGLU], ids=["mlp", "swiglu"])
def test_the_merged_state_gives_the_features_of_the_live_student(tiny, layers):
    cfg = tiny.resolve(*LORA, *layers)
    model = prepared(cfg)
    live = model.student["backbone"]
    stir(live)
    plain = SSLMetaArch(tiny.resolve(*layers)).student["backbone"]
    before = {name: tensor.clone() for name, tensor in live.state_dict().items()}
    plain.load_state_dict(plain_state_dict(live), strict=True)
    for name, tensor in live.state_dict().items():
        assert torch.equal(tensor, before[name]), f"merging changed {name}"
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        expected, got = live.eval()(images), plain.eval()(images)
        untouched = model.teacher["backbone"](images)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert (expected - untouched).abs().max() > 1e-2, "the updates do nothing, so nothing was compared"


def test_the_teacher_follows_the_merged_weights(tiny):
    model = prepared(tiny.resolve(*LORA))
    stir(model.student)
    before = {name: tensor.clone() for name, tensor in model.teacher.state_dict().items()}
    model.update_teacher(0.75)
    after, student = model.teacher.state_dict(), by_hand(model.student["backbone"])
    assert {f"backbone.{name}" for name in student} == {n for n in after if n.startswith("backbone.")}
    for name, tensor in student.items():
        expected = 0.75 * before[f"backbone.{name}"] + 0.25 * tensor
        torch.testing.assert_close(after[f"backbone.{name}"], expected, rtol=1e-5, atol=1e-6)
        adapted = (
            name.endswith(("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight")) and "blocks" in name
        )
        moved = not torch.equal(after[f"backbone.{name}"], before[f"backbone.{name}"])
        assert moved == (adapted or name == "mask_token"), name
    for name, tensor in model.student["dino_head"].state_dict().items():
        expected = 0.75 * before[f"dino_head.{name}"] + 0.25 * tensor
        torch.testing.assert_close(after[f"dino_head.{name}"], expected)


def test_exports_are_plain_and_the_run_state_keeps_the_factors(tiny, tmp_path):
    tiny.start(tmp_path / "lora", *LORA)
    tiny.start(tmp_path / "plain", "optim.max_iterations=3")
    names = load(tmp_path / "plain/eval/training_2/student_checkpoint.pth")["student"].keys()
    exports = tmp_path / "lora/eval/training_5"
    state = read_state(tmp_path / "lora/model_final")["model"]
    assert any(".lora_B." in name for name in state)
    assert not any("lora" in name for name in state if name.startswith("teacher."))
    live = prepared(tiny.resolve(*LORA)).student["backbone"]
    start = {name: tensor.clone() for name, tensor in live.state_dict().items()}
    prefix = "student.backbone."
    live.load_state_dict({n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)})
    assert not torch.equal(
        start["blocks.0.attn.qkv.lora_B.default.weight"], live.blocks[0].attn.qkv.lora_B["default"].weight
    )
    for network in ("student", "teacher"):
        content = load(exports / f"{network}_checkpoint.pth")[network]
        assert content.keys() == names
        plain = SSLMetaArch(tiny.resolve()).student["backbone"]
        load_backbone(plain, str(exports / f"{network}_checkpoint.pth"), entry=network)
        images = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            if network == "student":
                torch.testing.assert_close(plain.eval()(images), live.eval()(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("overrides", [(), ("train.freeze_backbone_iterations=3",)], ids=["", "frozen"])
def test_a_resumed_run_equals_an_uninterrupted_one(tiny, tmp_path, overrides):
    settings = (*LORA, *overrides, "checkpointing.period=3")
    tiny.start(tmp_path / "whole", *settings)
    (tmp_path / "resumed").mkdir()
    shutil.copytree(tmp_path / "whole/model_0000002", tmp_path / "resumed/model_0000002")
    tiny.start(tmp_path / "resumed", *settings)
    expected, got = (read_state(tmp_path / run / "model_final")["model"] for run in ("whole", "resumed"))
    assert expected.keys() == got.keys()
    assert all(torch.equal(tensor, got[name]) for name, tensor in expected.items())
    assert [row["total_loss"] for row in metrics(tmp_path / "whole")[3:]] == [
        row["total_loss"] for row in metrics(tmp_path / "resumed")
    ]


def test_the_real_weights_survive_the_adapters(real_vits14):
    from dinov2.models.vision_transformer import vit_small

    backbone = vit_small(patch_size=14, img_size=56, init_values=1.0, block_chunks=0).eval()
    load_backbone(backbone, str(real_vits14))
    images = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        expected = backbone(images)
        add_adapters(backbone, rank=4, alpha=8.0)
        torch.testing.assert_close(backbone(images), expected, atol=1e-5, rtol=1e-5)
        stir(backbone)
        live = backbone(images)
        plain = vit_small(patch_size=14, img_size=56, init_values=1.0, block_chunks=0).eval()
        plain.load_state_dict(plain_state_dict(backbone), strict=True)
        torch.testing.assert_close(plain(images), live, atol=1e-4, rtol=1e-4)
    assert (live - expected).abs().max() > 0.1


def test_lora_and_frozen_blocks_exclude_each_other(tiny):
    with pytest.raises(ConfigError, match=r"student.lora_rank 2 .* train.freeze_blocks 1 contradicts"):
        tiny.resolve(*LORA, "train.freeze_blocks=1")


def test_peft_missing_is_one_sentence(tiny, monkeypatch):
    real_import = builtins.__import__

    def without_peft(name, *args, **kwargs):
        if name == "peft":
            raise ImportError("No module named 'peft'")
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_peft)
    model = SSLMetaArch(tiny.resolve(*LORA))
    with pytest.raises(ConfigError) as caught:
        model.prepare_for_distributed_training()
    assert str(caught.value) == (
        "student.lora_rank is 2, which needs the package peft, which cannot be imported "
        "(No module named 'peft'): "
        'run "uv pip install --upgrade peft", or set student.lora_rank to 0.'
    )
