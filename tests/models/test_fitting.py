"""Positions and patch embeddings of other sizes, fitted when the weights are loaded."""

import pytest
import timm
import torch
import torch.nn.functional as F

from dinov2.models.pretrained import load_backbone, open_weights
from dinov2.models.vision_transformer import vit_small
from tests.models.vits import refusal, tiny


def test_the_papers_crop_gives_the_models_own_positions_at_the_middle(real_vits14):
    weights = open_weights(str(real_vits14))
    model = vit_small(patch_size=14, img_size=224, init_values=1.0, block_chunks=0)
    report = load_backbone(model, weights, pos_embed="center_crop")
    assert report.resampled == {"pos_embed": "37x37 -> 16x16, the middle cut out"}
    stored = weights.state["pos_embed"].read()
    middle = stored[:, 1:].view(37, 37, 384)[10:26, 10:26].reshape(1, 256, 384)
    assert torch.equal(model.pos_embed[:, 1:], middle) and torch.equal(model.pos_embed[:, :1], stored[:, :1])


def test_no_middle_is_larger_than_the_whole():
    message = refusal(tiny(img_size=56), tiny(img_size=28).state_dict(), pos_embed="center_crop")
    assert "laid out for 4x4 patches, of which no 8x8 can be cut" in message


@pytest.mark.parametrize("option", [{"pos_embed": "centre_crop"}, {"patch_embed": "pinv"}])
def test_unknown_ways_of_fitting_are_refused(option):
    assert "is unknown" in refusal(tiny(), tiny().state_dict(), **option)


def test_a_patch_that_is_no_square_is_not_fitted_by_itself():
    state = dict(tiny().state_dict())
    state["patch_embed.proj.weight"] = torch.zeros(24, 3, 9, 7)
    assert "patch_embed.proj.weight (24, 3, 9, 7) instead of (24, 3, 7, 7)" in refusal(tiny(), state)


@pytest.mark.parametrize(("stored", "wanted"), [(16, 14), (14, 16)])
def test_a_patch_embedding_is_resampled_only_when_asked_for(stored, wanted):
    source = tiny(img_size=4 * stored, patch_size=stored)
    model = tiny(seed=1, img_size=4 * wanted, patch_size=wanted)
    assert f"patch size is {stored} in the weights and {wanted}" in refusal(model, source.state_dict())
    report = load_backbone(model, source.state_dict(), patch_embed="pseudo_inverse")
    how = f"{stored}x{stored} -> {wanted}x{wanted} px by the pseudo-inverse"
    assert report.resampled == {"patch_embed.proj.weight": how}
    expected = timm.layers.resample_patch_embed(source.patch_embed.proj.weight, [wanted, wanted])
    torch.testing.assert_close(model.patch_embed.proj.weight, expected, rtol=1e-4, atol=1e-5)


def test_larger_patches_of_a_larger_image_give_the_same_features():
    """14 to 16 px loses nothing: resizing the image patch by patch and the embedding cancel out."""
    source, x = tiny(img_size=56, patch_size=14), torch.randn(1, 3, 56, 56)
    model = tiny(seed=1, img_size=64, patch_size=16)
    load_backbone(model, source.state_dict(), patch_embed="pseudo_inverse")
    patches = F.unfold(x, 14, stride=14).transpose(1, 2).reshape(-1, 3, 14, 14)
    larger = F.interpolate(patches, size=(16, 16), mode="bicubic", antialias=True)
    image = F.fold(larger.reshape(1, 16, -1).transpose(1, 2), (64, 64), 16, stride=16)
    with torch.inference_mode():
        torch.testing.assert_close(model(image), source(x), rtol=1e-4, atol=1e-4)
