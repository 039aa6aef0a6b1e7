"""DropPath per sample and LayerScale."""

import pytest
import torch

from dinov2.layers import LayerScale
from dinov2.layers.drop_path import DropPath, drop_path


def test_whole_samples_are_dropped_and_the_mean_kept():
    torch.manual_seed(0)
    x = torch.ones(5000, 2, 3)
    out = drop_path(x, 0.3, training=True)
    per_sample = out[:, 0, 0]
    assert torch.equal(out, per_sample[:, None, None].expand_as(out))
    torch.testing.assert_close(per_sample.unique(), torch.tensor([0.0, 1 / 0.7]))
    assert (per_sample == 0).float().mean().item() == pytest.approx(0.3, abs=0.03)
    assert x.eq(1).all()


def test_limits():
    x = torch.randn(4, 3)
    assert drop_path(x, 0.3) is x and drop_path(x, 0.0, training=True) is x
    assert not drop_path(x, 1.0, training=True).any()
    assert DropPath().train()(x) is x and DropPath(0.5).eval()(x) is x


def test_layer_scale():
    scale = LayerScale(3, init_values=0.5)
    x = torch.ones(2, 3)
    assert torch.equal(scale(x), torch.full((2, 3), 0.5)) and x.eq(1).all()
    with torch.no_grad():
        assert LayerScale(3, 0.5, inplace=True)(x) is x and x.eq(0.5).all()
    scale.gamma.data.zero_()
    scale.reset_parameters()
    assert scale.gamma.tolist() == [0.5] * 3
    assert LayerScale(3, torch.tensor([1.0, 2.0, 3.0])).gamma.tolist() == [1.0, 2.0, 3.0]
    assert LayerScale(3, device="meta", dtype=torch.float16).gamma.dtype == torch.float16
