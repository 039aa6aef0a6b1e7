"""Exports to transformers, opened by transformers itself."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dinov2.data.transforms import make_classification_eval_transform
from dinov2.errors import WeightsError
from dinov2.hub import export
from dinov2.models.pretrained import build_from_weights
from tests.conftest import REAL_DATA
from tests.hub.variants import HEADS, SIZE, VARIANTS, all_tokens, saved, variant
from tests.models.test_real_vits14 import TOLERANCE, tile

transformers = pytest.importorskip("transformers")


def opened(folder):
    model, report = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def exported(model, tmp_path, *options):
    weights = saved(model, tmp_path / "weights.pth")
    folder = tmp_path / "transformers"
    arguments = ["--checkpoint", weights, "--to", "transformers", "--output", str(folder)]
    export.main([*arguments, "--num-heads", str(HEADS), *options])
    return folder


@pytest.mark.parametrize("name", VARIANTS)
def test_transformers_gives_our_features(name, tmp_path):
    model = variant(**VARIANTS[name])
    folder = exported(model, tmp_path)
    theirs = opened(folder)
    kind = "Dinov2WithRegistersModel" if model.num_register_tokens else "Dinov2Model"
    assert type(theirs).__name__ == kind
    x, expected = tile(SIZE), all_tokens(model, tile(SIZE))
    with torch.inference_mode():
        assert (theirs(x).last_hidden_state - expected).abs().max() < TOLERANCE
    masks = torch.arange(theirs.embeddings.patch_embeddings.num_patches).remainder(3).eq(0).unsqueeze(0)
    with torch.inference_mode():
        masked = theirs(x, bool_masked_pos=masks).last_hidden_state[:, 0]
        ours_masked = model.forward_features(x, masks)["x_norm_clstoken"]
    assert (masked - ours_masked).abs().max() < TOLERANCE < (masked - expected[:, 0]).abs().max()
    ours = build_from_weights(str(folder), num_heads=HEADS).eval()
    assert (all_tokens(ours, x) - expected).abs().max() < 1e-6


@pytest.mark.parametrize("name", ["plain", "SwiGLU"])
def test_names_are_those_the_library_writes(name, tmp_path):
    folder = exported(variant(**VARIANTS[name]), tmp_path)
    opened(folder).save_pretrained(tmp_path / "again")
    ours, theirs = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "again"))
    assert set(ours) == set(theirs)
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())
    written, read = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "again"))
    assert written.items() <= {**written, **read}.items()


@pytest.mark.parametrize("size", [[], ["--img-size", "224"]])
def test_the_real_weights(real_vits14, tmp_path, size):
    folder = tmp_path / "transformers"
    export.main(["--checkpoint", str(real_vits14), "--to", "transformers", "--output", str(folder), *size])
    x = tile(224 if size else 518)
    ours = build_from_weights(str(real_vits14)).eval()
    with torch.inference_mode():
        theirs = opened(folder)(x).last_hidden_state
    assert (theirs - all_tokens(ours, x)).abs().max() < TOLERANCE


def test_its_own_processor_prepares_images_as_ours(tmp_path):
    constants = ["--mean", "0.7", "0.6", "0.5", "--std", "0.2", "0.3", "0.4"]
    folder = exported(variant(img_size=224), tmp_path, *constants)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    ours = make_classification_eval_transform(mean=(0.7, 0.6, 0.5), std=(0.2, 0.3, 0.4))
    with Image.open(REAL_DATA / "hgsc_nest.jpg") as picture:
        image = picture.convert("RGB")
    theirs = processor(image, return_tensors="pt")["pixel_values"]
    grey_level = 1 / 255 / 0.2  # it resizes tensors, which differs from Pillow by rounding
    assert (theirs - ours(image)).abs().max() < 2.5 * grey_level


def test_what_stands_for_missing_parts_is_said(tmp_path, capsys):
    exported(variant(init_values=None, proj_bias=False), tmp_path)
    said = capsys.readouterr().out
    assert "gains of one" in said and "zeros stand for" in said


def test_a_width_it_has_no_whole_ratio_for_is_refused(tmp_path):
    with pytest.raises(WeightsError, match="no hidden width of 168.*whole mlp_ratio; export to timm"):
        exported(variant(mlp_ratio=3.5), tmp_path)
    assert not (tmp_path / "transformers").exists()
