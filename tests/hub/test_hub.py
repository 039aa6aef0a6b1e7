"""The released models by name: sizes, addresses, loading from a file, and what happens without a network."""

import subprocess
import sys

import pytest
import torch

import hubconf
from dinov2.errors import WeightsError
from dinov2.hub import backbones, classifiers, utils
from tests.conftest import REPO

SIZES = {"vits14": (384, 22_056_576, 175), "vitb14": (768, 86_580_480, 175)}
SIZES |= {"vitl14": (1024, 304_368_640, 343), "vitg14": (1536, 1_136_480_768, 567)}


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    monkeypatch.setenv("DINOV2_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(utils, "_DINOV2_BASE_URL", "http://127.0.0.1:1/dinov2")


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("registers", [0, 4])
def test_backbones_have_the_released_sizes(name, registers):
    width, parameters, entries = SIZES[name]
    with torch.device("meta"):  # the largest would need 4.5 GB
        model = getattr(hubconf, f"dinov2_{name}" + ("_reg" if registers else ""))(pretrained=False)
    assert model.embed_dim == width and model.patch_size == 14 and model.num_register_tokens == registers
    assert sum(p.numel() for p in model.parameters()) == parameters + registers * width
    assert len(model.state_dict()) == entries + bool(registers)
    assert model.pos_embed.shape == (1, 1370, width)
    assert (model.interpolate_antialias, model.interpolate_offset) == (
        (True, 0.0) if registers else (False, 0.1)
    )
    assert not model.chunked_blocks


def test_names_and_addresses_are_those_of_the_release():
    assert utils._make_dinov2_model_name("vit_giant2", 14) == "dinov2_vitg14"
    assert utils._make_dinov2_model_name("vit_small", 14, 4) == "dinov2_vits14_reg4"
    base = utils._DINOV2_BASE_URL
    assert base.endswith("/dinov2")
    expected = f"{base}/dinov2_vitb14/dinov2_vitb14_reg4_pretrain.pth"
    assert utils.release_url("vit_base", 14, 4, "pretrain") == expected
    expected = f"{base}/dinov2_vitl14/dinov2_vitl14_linear4_head.pth"
    assert utils.release_url("vit_large", 14, 0, classifiers.HEAD_SUFFIXES[4]) == expected
    entry_points = {name for name in dir(hubconf) if name.startswith("dinov2_")}
    assert entry_points == {f"dinov2_{n}{r}{c}" for n in SIZES for r in ("", "_reg") for c in ("", "_lc")}


def test_torch_hub_loads_from_a_checkout(real_vits14, tmp_path):
    """In a process that does not know the package, as a user's would."""
    code = f"""
import torch
repo, path = {str(REPO)!r}, {str(real_vits14)!r}
model = torch.hub.load(repo, "dinov2_vits14", source="local", pretrained=False)
assert model(torch.zeros(1, 3, 28, 28)).shape == (1, 384)
loaded = torch.hub.load(repo, "dinov2_vits14", source="local", weights=path)
from safetensors.torch import load_file
assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in load_file(path).items())
assert "dinov2.train" not in __import__("sys").modules
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_options_replace_the_released_ones(real_vits14):
    model = hubconf.dinov2_vits14(weights=str(real_vits14), img_size=224, block_chunks=4)
    assert model.pos_embed.shape == (1, 257, 384) and model.chunked_blocks


def test_positions_keep_the_grid_they_are_stored_with(real_vits14, tmp_path):
    finetuned = hubconf.dinov2_vits14(weights=str(real_vits14), img_size=98).eval()
    torch.save({"teacher": finetuned.state_dict()}, tmp_path / "teacher_checkpoint.pth")
    loaded = hubconf.dinov2_vits14(weights=str(tmp_path)).eval()
    x = torch.randn(1, 3, 98, 98)
    with torch.inference_mode():
        assert torch.equal(loaded(x), finetuned(x))


def test_without_a_network_one_sentence_says_what_to_do(no_network):
    with pytest.raises(WeightsError) as caught:
        hubconf.dinov2_vits14()
    message = str(caught.value)
    assert "dinov2_vits14/dinov2_vits14_pretrain.pth" in message and "path" in message and "\n" not in message


@pytest.mark.parametrize("entry_point", ["dinov2_vits14", "dinov2_vits14_lc"])
def test_unknown_weights_get_a_suggestion(entry_point):
    with pytest.raises(WeightsError, match="is unknown.*did you mean.*accepted is"):
        getattr(hubconf, entry_point)(
            weights={"dinov2_vits14": "LVD142", "dinov2_vits14_lc": "IMAGENET"}[entry_point]
        )


def test_weights_without_pretrained_are_a_contradiction():
    with pytest.raises(WeightsError, match="contradict"):
        hubconf.dinov2_vits14(pretrained=False, weights="weights.pth")
    hubconf.dinov2_vits14(pretrained=False, weights=backbones.Weights.LVD142M)


@pytest.mark.parametrize("layers", [1, 4])
@pytest.mark.parametrize("registers", ["", "_reg"])
def test_a_classifier_sees_cls_tokens_and_the_mean_patch(layers, registers, tmp_path):
    build = getattr(hubconf, f"dinov2_vits14{registers}_lc")
    model = build(layers=layers, pretrained=False).eval()
    assert set(dict(model.named_children())) == {"backbone", "linear_head"}
    assert model.linear_head.weight.shape == (1000, (1 + layers) * 384)

    after_block = []
    for block in model.backbone.blocks:
        block.register_forward_hook(lambda module, args, output: after_block.append(output))
    x = torch.randn(2, 3, 42, 28)
    with torch.inference_mode():
        logits = model(x)
        normed = [model.backbone.norm(tokens) for tokens in after_block[-layers:]]
        patches = normed[-1][:, 1 + model.backbone.num_register_tokens :]
        assert patches.shape[1] == 3 * 2
        features = torch.cat([tokens[:, 0] for tokens in normed] + [patches.mean(dim=1)], dim=1)
        torch.testing.assert_close(logits, model.linear_head(features))


def test_a_classifier_loads_both_files(real_vits14, tmp_path):
    linear = torch.nn.Linear(2 * 384, 1000)
    torch.save(linear.state_dict(), tmp_path / "head.pth")
    options = {"weights": str(tmp_path / "head.pth"), "backbone_weights": str(real_vits14)}
    model = hubconf.dinov2_vits14_lc(layers=1, **options)
    assert torch.equal(model.linear_head.weight, linear.weight)
    with pytest.raises(WeightsError, match="does not fit"):
        hubconf.dinov2_vits14_lc(layers=4, **options)
    with pytest.raises(WeightsError, match="accepted is 1 or 4"):
        hubconf.dinov2_vits14_lc(layers=2)


@pytest.mark.parametrize(("size", "padded"), [((28, 42), (28, 42)), ((29, 41), (42, 42)), ((1, 1), (14, 14))])
def test_center_padding(size, padded):
    out = utils.CenterPadding(14)(torch.ones(1, 3, *size))
    assert out.shape == (1, 3, *padded)
    assert out.sum() == 3 * size[0] * size[1]
    top, left = (padded[0] - size[0]) // 2, (padded[1] - size[1]) // 2
    assert out[0, 0, top : top + size[0], left : left + size[1]].min() == 1
