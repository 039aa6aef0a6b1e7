"""Backbones from config sections."""

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

import dinov2.models as models
from dinov2.errors import ConfigError
from dinov2.models import build_model, build_model_from_cfg
from dinov2.models.vision_transformer import DinoVisionTransformer
from tests.conftest import GOLDEN, load_golden_json

STUDENT = {
    "arch": "vit_tiny",
    "patch_size": 14,
    "drop_path_rate": 0.3,
    "drop_path_uniform": True,
    "layerscale": 1.0e-5,
    "ffn_layer": "mlp",
    "block_chunks": 0,
    "qkv_bias": True,
    "proj_bias": True,
    "ffn_bias": True,
    "num_register_tokens": 0,
    "interpolate_antialias": False,
    "interpolate_offset": 0.1,
}


def _student(kind="namespace", **changes):
    values = {**STUDENT, **changes}
    if kind == "namespace":
        return SimpleNamespace(**values)
    section = OmegaConf.create(values)
    OmegaConf.set_struct(section, kind == "struct")
    return section


@pytest.mark.parametrize("kind", ["namespace", "open", "struct"])
def test_student_and_teacher(kind):
    args = _student(kind)
    student, teacher, embed_dim = build_model(args, img_size=98)
    assert embed_dim == student.embed_dim == 192
    assert student.pos_embed.shape[1] == teacher.pos_embed.shape[1] == 1 + 7 * 7
    assert {block.sample_drop_ratio for block in student.blocks} == {0.3}
    assert {block.sample_drop_ratio for block in teacher.blocks} == {0.0}
    assert not torch.equal(student.pos_embed, teacher.pos_embed)


def test_only_teacher_and_default_size():
    teacher, embed_dim = build_model(_student(), only_teacher=True)
    assert isinstance(teacher, DinoVisionTransformer) and embed_dim == 192
    assert teacher.pos_embed.shape[1] == 1 + 16 * 16


def test_memeff_suffix_is_accepted_and_args_are_left_alone():
    args = _student(arch="vit_tiny_memeff")
    before = copy.deepcopy(vars(args))
    teacher, _ = build_model(args, only_teacher=True, img_size=28)
    assert teacher.embed_dim == 192 and vars(args) == before


def test_every_option_reaches_the_model():
    args = _student(
        patch_size=16,
        layerscale=0.0,
        ffn_layer="swiglufused",
        block_chunks=4,
        qkv_bias=False,
        proj_bias=False,
        ffn_bias=False,
        num_register_tokens=3,
        interpolate_antialias=True,
        interpolate_offset=0.0,
    )
    model, _ = build_model(args, only_teacher=True, img_size=32)
    names = set(model.state_dict())
    assert model.patch_size == 16 and model.num_register_tokens == 3
    assert model.interpolate_antialias is True and model.interpolate_offset == 0.0
    assert "blocks.3.11.mlp.w12.weight" in names
    assert not any("gamma" in n for n in names)
    biased = {
        n.removesuffix(".bias").split(".")[-1] for n in names if n.startswith("blocks") and n.endswith("bias")
    }
    assert biased == {"norm1", "norm2"}


@pytest.mark.parametrize("kind", ["namespace", "struct"])
def test_sizes_may_be_overridden_one_by_one(kind):
    unchanged = _student(kind, embed_dim=None, depth=None, num_heads=None)
    assert build_model(unchanged, only_teacher=True, img_size=28)[1] == 192
    model, embed_dim = build_model(
        _student(kind, embed_dim=96, depth=4, num_heads=2), only_teacher=True, img_size=28
    )
    assert (embed_dim, model.embed_dim, model.n_blocks, model.num_heads) == (96, 96, 4, 2)
    with pytest.raises(ConfigError, match="100 cannot be shared by 3"):
        build_model(_student(kind, embed_dim=100), only_teacher=True, img_size=28)


@pytest.mark.parametrize(
    ("arch", "hint"),
    [("vit_smal", 'did you mean "vit_small"'), ("resnet50", "use one of vit_tiny, vit_small")],
)
def test_unknown_architecture(arch, hint):
    with pytest.raises(ConfigError, match=f'student.arch "{arch}" is unknown.*{hint}'):
        build_model(_student(arch=arch))


def test_functions_of_the_module_are_no_architectures():
    with pytest.raises(ConfigError, match="is unknown"):
        build_model(_student(arch="init_weights_vit_timm"))


@pytest.mark.parametrize(
    "case", ["centering_shared", "centering_separate", "sinkhorn_shared", "stock_vit_small"]
)
def test_recorded_configs(monkeypatch, case):
    tiny = dict(load_golden_json("meta_cases.json")["tiny_arch"])
    monkeypatch.setitem(models.ARCHITECTURES, tiny.pop("name"), partial(DinoVisionTransformer, **tiny))
    cfg = OmegaConf.load(GOLDEN / f"meta_{case}.yaml")
    student, teacher, embed_dim = build_model_from_cfg(cfg)
    assert student.n_blocks == teacher.n_blocks == (12 if case == "stock_vit_small" else tiny["depth"])
    assert embed_dim == (384 if case == "stock_vit_small" else tiny["embed_dim"])
    assert build_model_from_cfg(cfg, only_teacher=True)[1] == embed_dim
