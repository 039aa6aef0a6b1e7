"""Patch embedding: order of the patches, attributes and refused sizes."""

import pytest
import timm.layers
import torch
import torch.nn.functional as F
from torch import nn

from dinov2.errors import ConfigError
from dinov2.layers import PatchEmbed
from dinov2.layers.patch_embed import make_2tuple, resample_patch_embedding


def test_tokens_are_projected_patches_row_by_row():
    torch.manual_seed(0)
    embed = PatchEmbed(28, 14, embed_dim=5)
    image = torch.randn(2, 3, 28, 42)
    tokens = embed(image)
    assert tokens.shape == (2, 6, 5)
    patch = image[1, :, 14:28, 28:42]  # row 1, column 2
    want = embed.proj.weight.flatten(1) @ patch.flatten() + embed.proj.bias
    torch.testing.assert_close(tokens[1, 1 * 3 + 2], want)


def test_grid_output_and_norm():
    torch.manual_seed(0)
    embed = PatchEmbed(28, 14, embed_dim=5, norm_layer=nn.LayerNorm, flatten_embedding=False)
    grid = embed(torch.randn(2, 3, 28, 42))
    assert grid.shape == (2, 2, 3, 5)
    torch.testing.assert_close(grid.mean(-1), torch.zeros(2, 2, 3), rtol=0, atol=1e-6)


def test_attributes():
    embed = PatchEmbed((28, 56), 14, embed_dim=5)
    assert embed.img_size == (28, 56) and embed.patch_size == (14, 14)
    assert embed.patches_resolution == (2, 4) and embed.num_patches == 8
    assert embed.flops() == 8 * 5 * 3 * 14 * 14
    assert PatchEmbed(28, 14, embed_dim=5, norm_layer=nn.LayerNorm).flops() == 4 * 5 * (3 * 14 * 14 + 1)


@pytest.mark.parametrize("size", [(28, 96), (96, 28), (13, 14)])
def test_sizes_that_do_not_divide_are_refused(size):
    with pytest.raises(ConfigError, match=f"{size[0]} x {size[1]} pixels .* patches of 14 x 14"):
        PatchEmbed(28, 14)(torch.zeros(1, 3, *size))


def test_make_2tuple():
    assert make_2tuple(3) == (3, 3) and make_2tuple((3, 4)) == (3, 4)
    for wrong in ([3, 4], (1, 2, 3), 3.0):
        with pytest.raises(TypeError, match="an integer or a tuple"):
            make_2tuple(wrong)


@pytest.mark.parametrize(("stored", "wanted"), [(16, 14), (14, 16), (16, 8), (8, 16)])
def test_resampled_patch_embeddings_equal_timm(stored, wanted):
    torch.manual_seed(0)
    weight = torch.randn(5, 3, stored, stored)
    expected = timm.layers.resample_patch_embed(weight, [wanted, wanted], verbose=False)
    torch.testing.assert_close(
        resample_patch_embedding(weight, (wanted, wanted)), expected, rtol=1e-4, atol=1e-4
    )


def test_larger_patches_give_the_same_tokens_for_resized_images():
    torch.manual_seed(0)
    weight, patch = torch.randn(5, 3, 14, 14), torch.rand(2, 3, 14, 14)
    larger = F.interpolate(patch, size=(16, 16), mode="bicubic", antialias=True)
    tokens = F.conv2d(larger, resample_patch_embedding(weight, (16, 16)))
    torch.testing.assert_close(tokens, F.conv2d(patch, weight), rtol=1e-4, atol=1e-4)
