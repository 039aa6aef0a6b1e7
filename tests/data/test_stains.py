"""Stain jitter against scikit-image's colour deconvolution."""

import numpy as np
import pytest
import torch

from dinov2.data.stains import adjust_stains

SKIMAGE_UNIT = -np.log(1e-6)  # scikit-image divides optical densities by this


def levels(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()


def separated(x):
    """Amounts of haematoxylin, eosin and residual [H, W, 3], natural-logarithm optical density."""
    from skimage.color import hed_from_rgb

    pixels = x[0].permute(1, 2, 0).double().numpy()
    return -np.log(pixels / 255) @ hed_from_rgb


def test_neutral_jitter_changes_nothing(tiles):
    noise = torch.randint(0, 256, (1, 3, 64, 64), generator=torch.Generator().manual_seed(0)).float()
    for x in (levels(tiles[0]), noise):
        assert torch.equal(adjust_stains(x, torch.ones(1, 3), torch.zeros(1, 3)), x)


@pytest.mark.parametrize(
    ("factors", "shifts"),
    [
        ((0.8, 1.2, 1.0), (0.0, 0.0, 0.0)),
        ((1.0, 1.0, 1.0), (0.05, 0.1, 0.02)),
        ((0.9, 1.1, 0.95), (0.05, 0.0, 0.1)),
    ],
)
def test_equals_scikit_image(tiles, factors, shifts):
    """Separate with scikit-image, change the amounts, and mix again."""
    from skimage.color import hed2rgb, rgb2hed

    x = levels(tiles[0]).clamp(min=1)  # what black stands for is a matter of definition
    pixels = x[0].permute(1, 2, 0).byte().numpy()
    stains = rgb2hed(pixels) * SKIMAGE_UNIT
    np.testing.assert_allclose(stains, np.maximum(separated(x), 0), atol=1e-6)  # it clips at 0
    changed = separated(x) * factors + shifts
    expected = np.clip(hed2rgb(changed / SKIMAGE_UNIT), 0, 1) * 255
    # hed2rgb clips amounts at 0 as well, so pixels with a negative one are left out.
    positive = (changed > 0).all(axis=-1)
    ours = adjust_stains(x, torch.tensor([factors]), torch.tensor([shifts]))[0].permute(1, 2, 0).numpy()
    assert positive.mean() > 0.02
    assert np.abs(ours - expected)[positive].max() <= 0.501


def test_crops_get_their_own_jitter(tiles):
    x = torch.cat([levels(tile) for tile in tiles[:2]])
    factors, shifts = torch.tensor([[0.8, 1.0, 1.0], [1.0, 1.3, 1.0]]), torch.tensor([[0.1] * 3, [0.0] * 3])
    together = adjust_stains(x, factors, shifts)
    for row in range(2):
        assert torch.equal(
            together[row : row + 1], adjust_stains(x[row : row + 1], factors[[row]], shifts[[row]])
        )
    assert together[1].mean() < x[1].mean()  # more eosin is darker
