"""What stands beside a weight file: heads, normalisation, and published models by their sizes."""

import json

import pytest
import timm
import torch
from omegaconf import OmegaConf

from dinov2.errors import WeightsError
from dinov2.layers import SwiGLUFFNFused
from dinov2.models.architecture import Architecture
from dinov2.models.companions import H_OPTIMUS, IMAGENET, published_like, read_companion
from dinov2.models.pretrained import build_from_weights, load_backbone, open_weights
from tests.models.vits import holds, refusal, tiny, written


def beside(folder, name, content):
    folder.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / name).write_text(text)
    return folder / "weights.pth"


def test_nothing_beside_says_nothing(tmp_path):
    companion = read_companion(tmp_path / "weights.pth")
    assert (companion.num_heads, companion.normalisation, companion.origin) == (None, None, ())


def test_timms_config(tmp_path):
    # What timm itself writes for the hub, with constants of another model's kind.
    model = timm.create_model("vit_tiny_patch16_224")
    cfg = {**model.pretrained_cfg, "mean": H_OPTIMUS[0], "std": H_OPTIMUS[1]}
    path = beside(
        tmp_path, "config.json", {"architecture": "x", "model_args": {"num_heads": 5}, "pretrained_cfg": cfg}
    )
    companion = read_companion(path)
    assert companion.num_heads == 5 and companion.normalisation == H_OPTIMUS


def test_transformers_configs(tmp_path):
    beside(tmp_path, "config.json", {"num_attention_heads": 4, "layer_norm_eps": 1e-12, "hidden_act": "gelu"})
    path = beside(tmp_path, "preprocessor_config.json", {"image_mean": [0.5] * 3, "image_std": [0.25] * 3})
    companion = read_companion(path)
    assert (companion.num_heads, companion.layer_norm_eps) == (4, 1e-12)
    assert companion.normalisation == ((0.5,) * 3, (0.25,) * 3)
    assert len(companion.origin) == 2


def test_the_config_of_the_run_that_wrote_it(tmp_path):
    cfg = {"student": {"arch": "vit_tiny", "num_heads": 4}, "crops": {"mean": [0.7] * 3, "std": [0.2] * 3}}
    beside(tmp_path, "config.yaml", OmegaConf.to_yaml(OmegaConf.create(cfg)))
    for written_by_the_run in ("eval/training_9/teacher_checkpoint.pth", "model_0000009.rank_0.pth"):
        companion = read_companion(tmp_path / written_by_the_run)
        assert companion.num_heads == 4 and companion.normalisation == ((0.7,) * 3, (0.2,) * 3)
    beside(tmp_path, "config.yaml", "somebody: else's\n")
    assert read_companion(tmp_path / "model_final.rank_0.pth").num_heads is None


def test_a_run_that_starts_from_a_file_does_not_speak_for_it(tmp_path):
    """Its config.yaml may lie in a folder above the weights, which have a config of their own."""
    cfg = {"student": {"num_heads": 6}, "crops": {"mean": [0.7] * 3, "std": [0.2] * 3}}
    beside(tmp_path, "config.yaml", OmegaConf.to_yaml(OmegaConf.create(cfg)))
    folder = tmp_path / "weights" / "optimus"
    for name in ("pytorch_model.bin", "teacher_checkpoint.pth"):
        beside(folder, "config.json", {"model_args": {"num_heads": 3}})
        companion = read_companion(folder / name)
        assert (companion.num_heads, companion.normalisation) == (3, None)
    export = tmp_path / "eval" / "training_9"
    beside(export, "config.json", {"num_attention_heads": 3})
    companion = read_companion(export / "teacher_checkpoint.pth")  # the nearer file counts, key by key
    assert (companion.num_heads, companion.normalisation) == (3, ((0.7,) * 3, (0.2,) * 3))


@pytest.mark.parametrize(
    "content",
    [
        {"model_args": [1], "pretrained_cfg": "x", "num_attention_heads": True, "layer_norm_eps": "1e-6"},
        {"pretrained_cfg": {"mean": "123", "std": [1, 1, 1]}},
        {"pretrained_cfg": {"mean": [0.5, 0.5, float("nan")], "std": [1, 1, 1]}},
        {"pretrained_cfg": {"mean": [0.5, 0.5], "std": [1, 1]}},
        [1, 2],
    ],
)
def test_values_of_another_kind_say_nothing(tmp_path, content):
    companion = read_companion(beside(tmp_path, "config.json", content))
    assert (companion.num_heads, companion.normalisation, companion.layer_norm_eps) == (None, None, None)


@pytest.mark.parametrize("content", ["{", "[1", "\x00", "[" * 100_000])
def test_a_damaged_companion_is_named(tmp_path, content):
    with pytest.raises(WeightsError, match="config.json"):
        read_companion(beside(tmp_path, "config.json", content))


def test_heads_that_contradict_the_model_are_refused(tmp_path):
    model = tiny()
    path = written(tmp_path / "weights.pth", model.state_dict())
    beside(tmp_path, "config.json", {"num_attention_heads": 3})
    assert "num heads is 3 in the weights and 2 in the model (student.num_heads)" in refusal(model, path)
    assert build_from_weights(path).num_heads == 3
    three_heads = tiny(seed=1, num_heads=3)
    load_backbone(three_heads, path)
    assert holds(three_heads, model.state_dict())


def test_an_unusual_width_needs_its_heads():
    state = tiny().state_dict()
    with pytest.raises(WeightsError, match="width 24, for which the number of attention heads"):
        build_from_weights(state)
    x = torch.randn(1, 3, 28, 28)
    assert torch.equal(build_from_weights(state, num_heads=2)(x), tiny()(x))


@pytest.mark.parametrize(
    ("name", "sizes", "normalisation"),
    [
        ("UNI", (1024, 24, 16, 0, 196, "mlp"), IMAGENET),
        ("UNI2-h", (1536, 24, 14, 8, 256, "swiglufused"), IMAGENET),
        ("H-optimus", (1536, 40, 14, 4, 256, "swiglufused"), H_OPTIMUS),
        ("Virchow2", (1280, 32, 14, 4, 256, "swiglufused"), None),
        ("DINOv2 ViT-g/14 with registers", (1536, 40, 14, 4, 1369, "swiglufused"), IMAGENET),
        (None, (1024, 24, 16, 0, 256, "mlp"), None),
    ],
)
def test_published_models_are_told_by_their_sizes(name, sizes, normalisation):
    width, depth, patch, registers, patches, ffn = sizes
    shape = Architecture(width, depth, patch, registers, ffn, 4 * width, True, True, True, True)
    found = published_like(shape, patches)
    assert (found and found.name) == name
    assert published_like(shape.without("layer_scale"), patches) is None  # timm's own ViTs have none
    assert found is None or found.normalisation == normalisation


def test_what_the_source_states_counts_more_than_its_sizes(tmp_path, real_vits14):
    assert open_weights(str(real_vits14)).normalisation == IMAGENET
    link = tmp_path / "weights.safetensors"
    link.symlink_to(real_vits14)
    beside(tmp_path, "config.json", {"pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}})
    assert open_weights(str(link)).normalisation == ((0.5,) * 3, (0.5,) * 3)


@pytest.mark.parametrize(("width", "hidden"), [(1408, 1414), (1152, 4304), (384, 1536), (1024, 3072)])
def test_every_hidden_width_of_an_mlp_can_be_built(width, hidden):
    shape = Architecture(width, 1, 14, 0, "mlp", hidden, True, True, True, True, num_heads=width // 32)
    ratio = shape.student_options("x")["mlp_ratio"]
    assert int(width * (ratio or 4)) == hidden


@pytest.mark.parametrize(("width", "hidden"), [(1280, 3416), (1536, 4096), (384, 1000), (1024, 2736)])
def test_hidden_widths_of_swiglu_are_met(width, hidden):
    shape = Architecture(width, 1, 14, 0, "swiglufused", hidden, True, True, True, True, num_heads=2)
    ratio = shape.student_options("x")["mlp_ratio"]
    layer = SwiGLUFFNFused(width, int(width * (ratio or 4)))
    assert layer.w3.in_features == hidden


def test_a_swiglu_that_cannot_be_built_is_refused():
    shape = Architecture(384, 1, 14, 0, "swiglufused", 1001, True, True, True, True, num_heads=2)
    with pytest.raises(WeightsError, match="only multiples of 8"):
        shape.student_options("x")
