"""Packing is undone by splitting, and packed positions point at the right tokens."""

import torch

from dinov2.layers.block import attn_bias_cache, get_attn_bias_and_cat
from dinov2.layers.packing import PackedLayout


def _batches():
    return [torch.arange(24.0).reshape(2, 3, 4), 100 + torch.arange(40.0).reshape(5, 2, 4)]


def test_split_undoes_pack():
    batches = _batches()
    layout = PackedLayout.of(batches)
    packed = layout.pack(batches)
    assert packed.shape == (1, 16, 4) and layout.shapes == ((2, 3), (5, 2)) and layout.sizes == [6, 10]
    assert all(map(torch.equal, layout.split(packed), batches))


def test_layouts_are_cached_by_their_shapes():
    first, _ = get_attn_bias_and_cat(_batches())
    second, _ = get_attn_bias_and_cat(_batches())
    assert first is second is attn_bias_cache[((2, 3), (5, 2))]
