"""The colour maps: one basis for all, signs that do not flip, glass left out."""

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2.models.vision_transformer import vit_tiny
from scripts.quickstart.pca import GLASS, colour_map, fit_basis, patch_tissue, shrink, token_map


@pytest.fixture
def tissue():
    return np.random.default_rng(1).random((9, 7)) > 0.3


@pytest.fixture
def tokens():
    generator = np.random.default_rng(0)
    spread = np.array([9.0, 6, 4, *[1] * 9])
    return (generator.normal(size=(9, 7, 12)) * spread).astype(np.float32)


def test_basis_is_the_leading_eigenvectors(tokens, tissue):
    directions = fit_basis([tokens], tissue).directions
    assert np.allclose(directions.T @ directions, np.eye(3))
    assert (np.abs(directions).argmax(axis=0) == [0, 1, 2]).all()


def test_signs_are_stable(tokens, tissue):
    """Mirroring all tokens leaves their covariance as it is; an unfixed sign would be free to flip."""
    first, mirrored = (fit_basis([values], tissue).directions for values in (tokens, -tokens))
    assert np.allclose(first, mirrored)
    assert (first[np.abs(first).argmax(axis=0), range(3)] > 0).all()


def test_equal_tokens_have_equal_colours_whatever_their_mean_and_scale(tokens, tissue):
    grids = [tokens, 3 * tokens + 5]
    basis = fit_basis(grids, tissue)
    first, second = (np.asarray(colour_map(grid, tissue, basis), int) for grid in grids)
    assert np.abs(first - second).max() <= 1


def test_glass_is_left_out(tokens, tissue):
    spoiled = tokens.copy()
    spoiled[~tissue] = 1e4
    basis = fit_basis([tokens], tissue)
    assert np.allclose(fit_basis([spoiled], tissue).directions, basis.directions)
    drawn = np.asarray(colour_map(tokens, tissue, basis, scale=1))
    assert (drawn[~tissue] == GLASS).all()
    assert (drawn[tissue][:, 3] == 255).all()
    assert drawn[tissue][:, :3].std(axis=0).min() > 30


def test_maps_follow_the_picture():
    """Rows stay rows: a picture that changes from top to bottom gives tokens that do."""
    picture = Image.new("RGB", (140, 224), "white")
    picture.paste((180, 60, 120), (0, 0, 140, 112))
    small = shrink(picture)
    assert small.shape == (112, 70, 3)
    assert patch_tissue(small).tolist() == [[row < 4] * 5 for row in range(8)]
    torch.manual_seed(0)
    model = vit_tiny(patch_size=14, img_size=112, block_chunks=0).eval()
    grid = token_map(model, small, device=torch.device("cpu"))
    assert grid.shape == (8, 5, model.embed_dim)
