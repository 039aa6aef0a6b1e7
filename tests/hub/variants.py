"""Small backbones with random weights, one for everything that export has to represent."""

from functools import partial
from pathlib import Path

import torch

from dinov2.layers import MemEffAttention, NestedTensorBlock
from dinov2.models.vision_transformer import DinoVisionTransformer

SIZE, HEADS = 56, 3
SIZES = {"img_size": SIZE, "patch_size": 14, "embed_dim": 48, "depth": 2, "num_heads": HEADS}
BLOCK = partial(NestedTensorBlock, attn_class=MemEffAttention)
VARIANTS = {
    "plain": {},
    "chunked": {"block_chunks": 2},
    "patch 8": {"patch_size": 8},
    "no qkv bias": {"qkv_bias": False},
    "no proj bias": {"proj_bias": False},
    "no ffn bias": {"ffn_bias": False},
    "no bias in the blocks": {"qkv_bias": False, "proj_bias": False, "ffn_bias": False},
    "no LayerScale": {"init_values": None},
    "registers": {"num_register_tokens": 4},
    "SwiGLU": {"ffn_layer": "swiglufused"},
    "SwiGLU, registers, no LayerScale, no ffn bias": {
        "ffn_layer": "swiglufused",
        "num_register_tokens": 8,
        "init_values": None,
        "ffn_bias": False,
    },
}


def variant(**options) -> DinoVisionTransformer:
    """A ViT of two blocks and width 48, with weights far from any initial value."""
    defaults = {**SIZES, "init_values": 0.1, "block_chunks": 0, "block_fn": BLOCK}
    model = DinoVisionTransformer(**{**defaults, **options}).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def saved(model: DinoVisionTransformer, path: Path) -> str:
    """Write the weights as a training export has them; return the path."""
    state = {f"backbone.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"teacher": state}, path)
    return str(path)


@torch.inference_mode()
def all_tokens(model: DinoVisionTransformer, x: torch.Tensor) -> torch.Tensor:
    """Normalised cls, register and patch tokens ``[B, 1 + R + N, D]``."""
    return model.norm(model.forward_features(x)["x_prenorm"])
