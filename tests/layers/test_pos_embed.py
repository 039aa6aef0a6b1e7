"""Resampled position embeddings: timm's for the exact size, linear ramps for both forms, refused grids."""

import pytest
import timm.layers
import torch
import torch.nn.functional as F

from dinov2.errors import ConfigError
from dinov2.layers.pos_embed import crop_positions, resample_positions


def _positions(side, width=6):
    torch.manual_seed(0)
    return torch.randn(1, 1 + side * side, width)


@pytest.mark.parametrize("grid", [(5, 5), (8, 3), (16, 16), (4, 9)])
@pytest.mark.parametrize("antialias", [False, True])
def test_exact_size_equals_timm(grid, antialias):
    positions = _positions(7)
    want = timm.layers.resample_abs_pos_embed(positions, list(grid), antialias=antialias)
    got = resample_positions(positions, grid, offset=0, antialias=antialias)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grid", [(5, 5), (8, 3), (16, 16)])
def test_historic_form_samples_at_the_given_scale(grid):
    side, offset = 7, 0.1
    positions = _positions(side)
    # Target i lies at source (i + 0.5) / scale, in pixels from the border; grid_sample takes that in -1..1.
    rows, columns = (2 * (torch.arange(cells) + 0.5) / (cells + offset) - 1 for cells in grid)
    points = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1)[None]
    source = positions[:, 1:].transpose(1, 2).unflatten(2, (side, side))
    want = F.grid_sample(source, points, mode="bicubic", padding_mode="border", align_corners=False)
    got = resample_positions(positions, grid, offset=offset)[:, 1:]
    torch.testing.assert_close(got, want.flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-4)
    exact = resample_positions(positions, grid, offset=0)[:, 1:]
    assert (got - exact).abs().max() > 0.05


@pytest.mark.parametrize(("side", "cells"), [(37, 39), (37, 43), (37, 78), (14, 61)])
@pytest.mark.parametrize("offset", [0.0, 0.1])
def test_grids_that_a_bare_scale_factor_misses(side, cells, offset):
    positions = _positions(side, width=1)
    grid = positions[:, 1:].transpose(1, 2).unflatten(2, (side, side))
    assert F.interpolate(grid, scale_factor=cells / side, mode="bicubic").shape[-1] != cells
    assert resample_positions(positions, (cells, cells), offset=offset).shape[1] == 1 + cells * cells


def test_cls_position_is_kept_and_float32_returned():
    positions = _positions(7).bfloat16()
    got = resample_positions(positions, (4, 9))
    assert got.dtype == torch.float32 and got.shape == (1, 37, 6)
    assert torch.equal(got[:, 0], positions[:, 0].float())


def test_refused():
    with pytest.raises(ConfigError, match="10 patches are not a square grid"):
        resample_positions(torch.zeros(1, 11, 4), (3, 3))
    with pytest.raises(ConfigError, match="interpolate_offset 1.5"):
        resample_positions(_positions(7), (5, 5), offset=1.5)


def test_cropping_keeps_the_middle_of_the_papers_grid():
    positions = torch.arange(1370.0).view(1, 1370, 1)
    cropped = crop_positions(positions, (16, 16))
    # Rows and columns 10 to 25 of the 37 x 37 grid; the cls position stands before it.
    expected = [0.0] + [1.0 + 37 * row + column for row in range(10, 26) for column in range(10, 26)]
    assert cropped.flatten().tolist() == expected


def test_cropping_takes_other_shapes_and_the_whole_grid():
    positions = torch.randn(1, 1 + 25, 3)
    assert torch.equal(crop_positions(positions, (5, 5)), positions)
    grid = positions[:, 1:].view(1, 5, 5, 3)
    assert torch.equal(crop_positions(positions, (3, 2))[:, 1:], grid[:, 1:4, 1:3].reshape(1, 6, 3))


@pytest.mark.parametrize(("patches", "grid"), [(25, (6, 5)), (24, (2, 2))])
def test_there_is_no_middle_larger_than_the_whole(patches, grid):
    with pytest.raises(ConfigError, match="no middle part"):
        crop_positions(torch.zeros(1, 1 + patches, 3), grid)
