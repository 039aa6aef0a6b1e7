"""Exports to timm, opened by timm itself."""

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dinov2.data.transforms import make_classification_eval_transform
from dinov2.hub import export
from dinov2.hub.export_timm import mlp_ratio
from dinov2.models.pretrained import build_from_weights
from tests.conftest import REAL_DATA
from tests.hub.variants import HEADS, SIZE, VARIANTS, all_tokens, saved, variant
from tests.models.test_real_vits14 import TOLERANCE, tile

timm = pytest.importorskip("timm")


def opened(folder):
    """timm's model; loading is strict by default, and the names are compared besides."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert set(load_file(folder / "model.safetensors")) == set(model.state_dict())
    return model


@pytest.mark.parametrize("name", VARIANTS)
def test_timm_gives_our_features(name, tmp_path):
    model = variant(**VARIANTS[name])
    weights = saved(model, tmp_path / "weights.pth")
    arguments = ["--checkpoint", weights, "--to", "timm", "--output", str(tmp_path / "timm")]
    export.main([*arguments, "--num-heads", str(HEADS)])
    theirs = opened(tmp_path / "timm")
    x, expected = tile(SIZE), all_tokens(model, tile(SIZE))
    with torch.inference_mode():
        assert (theirs.forward_features(x) - expected).abs().max() < TOLERANCE
        assert (theirs(x) - expected[:, 0]).abs().max() < TOLERANCE
    ours = build_from_weights(str(tmp_path / "timm"), num_heads=HEADS).eval()
    assert (all_tokens(ours, x) - expected).abs().max() < 1e-6


def test_what_timm_has_no_place_for_is_said(tmp_path, capsys):
    for name, said in (("plain", "no mask token"), ("no ffn bias", "zeros stand for")):
        weights = saved(variant(**VARIANTS[name]), tmp_path / "weights.pth")
        arguments = ["--checkpoint", weights, "--to", "timm", "--output", str(tmp_path / name)]
        export.main([*arguments, "--num-heads", str(HEADS)])
        assert said in capsys.readouterr().out


@pytest.mark.parametrize("size", [[], ["--img-size", "224"]])
def test_the_real_weights(real_vits14, tmp_path, size):
    folder = tmp_path / "timm"
    export.main(["--checkpoint", str(real_vits14), "--to", "timm", "--output", str(folder), *size])
    theirs, pixels = opened(folder), 224 if size else 518
    ours = build_from_weights(str(real_vits14)).eval()  # resamples positions when it sees 224 pixels
    x = tile(pixels)
    with torch.inference_mode():
        assert (theirs.forward_features(x) - all_tokens(ours, x)).abs().max() < TOLERANCE
    assert type(theirs).__name__ == "VisionTransformer" and theirs.num_classes == 0
    assert theirs.pretrained_cfg["architecture"] == "vit_small_patch14_dinov2"


def test_another_loader_of_timm_reads_the_file(real_vits14, tmp_path):
    export.main(["--checkpoint", str(real_vits14), "--to", "timm", "--output", str(tmp_path / "timm")])
    overlay = {"file": str(tmp_path / "timm" / "model.safetensors")}
    model = timm.create_model(
        "vit_small_patch14_dinov2", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0
    )
    stored = load_file(overlay["file"])
    assert all(torch.equal(tensor, stored[name]) for name, tensor in model.state_dict().items())


def test_timms_own_transform_prepares_images_as_ours(tmp_path):
    weights = saved(variant(img_size=224), tmp_path / "weights.pth")
    constants = ["--mean", "0.7", "0.6", "0.5", "--std", "0.2", "0.3", "0.4"]
    arguments = ["--checkpoint", weights, "--to", "timm", "--output", str(tmp_path / "timm")]
    export.main([*arguments, *constants, "--num-heads", str(HEADS)])
    data = timm.data.resolve_model_data_config(opened(tmp_path / "timm"))
    theirs = timm.data.create_transform(**data, is_training=False)
    ours = make_classification_eval_transform(mean=(0.7, 0.6, 0.5), std=(0.2, 0.3, 0.4))
    with Image.open(REAL_DATA / "hgsc_nest.jpg") as picture:
        image = picture.convert("RGB")
    assert torch.equal(theirs(image), ours(image))


@pytest.mark.parametrize("width", [48, 384, 1152, 1280, 1408, 1536])
def test_a_ratio_leads_back_to_the_hidden_width(width):
    for hidden in range(2 * width, 6 * width, 7):
        assert int(width * mlp_ratio(hidden, width)) == hidden
