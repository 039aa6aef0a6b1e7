"""Tiny backbones with weights far from any initial value, and what a refused load must look like."""

from functools import partial

import pytest
import torch

from dinov2.errors import WeightsError
from dinov2.layers import MemEffAttention, NestedTensorBlock
from dinov2.models.pretrained import load_backbone
from dinov2.models.vision_transformer import DinoVisionTransformer

block_fn = partial(NestedTensorBlock, attn_class=MemEffAttention)


def tiny(seed=0, **options) -> DinoVisionTransformer:
    """A ViT of 4 blocks and width 24, with weights far from any initial value.

    What is loaded into needs another seed than what is loaded, or nothing tells whether it was.
    """
    sizes = {"img_size": 28, "patch_size": 7, "embed_dim": 24, "depth": 4, "num_heads": 2, "init_values": 0.1}
    model = DinoVisionTransformer(**{**sizes, "block_chunks": 0, "block_fn": block_fn, **options}).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def refusal(model, source, **options) -> str:
    """The one sentence of the refusal; the model must be untouched."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(WeightsError) as caught:
        load_backbone(model, source, **options)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    message = str(caught.value)
    assert "\n" not in message
    return message


def holds(model, state) -> bool:
    """Whether the model has the values of a state dict with names and sizes of its own."""
    return all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def written(path, content) -> str:
    torch.save(content, path)
    return str(path)


def named(prefix, model):
    return {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}
