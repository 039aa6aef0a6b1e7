"""``student.arch: auto``: what the weights decide, what stays the config's, and what is warned of."""

import logging

import pytest
import torch

from dinov2.configs import dinov2_default_config, resolve_config
from dinov2.models import build_model_from_cfg
from dinov2.models.auto import settle_architecture
from dinov2.models.pretrained import load_backbone, open_weights
from tests.models.vits import tiny


def settled(state, *overrides):
    cfg = resolve_config("", ["student.arch=auto", "student.num_heads=2", *overrides])
    settle_architecture(cfg.student, open_weights(state), dinov2_default_config.student)
    return cfg


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"qkv_bias": False, "init_values": None, "num_register_tokens": 3},
        {"ffn_layer": "swiglufused", "mlp_ratio": 3, "ffn_bias": False, "proj_bias": False},
        {"block_chunks": 2, "depth": 6},
    ],
)
def test_the_model_that_is_built_takes_the_weights(options):
    source = tiny(img_size=28, **options)
    cfg = settled(source.state_dict(), "crops.global_crops_size=28", "crops.local_crops_size=14")
    model, _ = build_model_from_cfg(cfg, only_teacher=True)
    assert load_backbone(model, source.state_dict()).share == 1.0
    x = torch.randn(1, 3, 28, 28)
    with torch.inference_mode():
        torch.testing.assert_close(model.eval()(x), source(x))


def test_another_architecture_is_left_alone():
    cfg = resolve_config("", ["student.arch=vit_base"])
    settle_architecture(cfg.student, open_weights(tiny().state_dict()), dinov2_default_config.student)
    assert cfg == resolve_config("", ["student.arch=vit_base"])


def test_stated_values_that_the_weights_contradict_are_warned_of(caplog):
    with caplog.at_level(logging.INFO, logger="dinov2"):
        settled(tiny().state_dict(), "student.depth=3", "student.qkv_bias=false")
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warned == [
        "student.depth 3 contradicts the weights, and student.arch auto sets it to 4",
        "student.qkv_bias False contradicts the weights, and student.arch auto sets it to True",
    ]
    assert "sets student.patch_size to 7" in caplog.text


def test_the_patch_size_stays_the_configs_where_the_embedding_is_resampled():
    source = tiny(img_size=64, patch_size=16)
    asked = ("student.patch_size=14", "student.patch_embed_resampling=pseudo_inverse")
    cfg = settled(source.state_dict(), *asked, "crops.global_crops_size=56", "crops.local_crops_size=28")
    assert cfg.student.patch_size == 14
    model, _ = build_model_from_cfg(cfg, only_teacher=True)
    report = load_backbone(model, source.state_dict(), patch_embed="pseudo_inverse")
    assert report.resampled == {"patch_embed.proj.weight": "16x16 -> 14x14 px by the pseudo-inverse"}
