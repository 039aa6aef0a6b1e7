"""Building blocks of the vision transformer and of the projection heads; they know no config and no ranks."""

from dinov2.layers.attention import Attention, MemEffAttention
from dinov2.layers.block import CausalAttentionBlock, NestedTensorBlock
from dinov2.layers.dino_head import DINOHead
from dinov2.layers.layer_scale import LayerScale
from dinov2.layers.mlp import Mlp
from dinov2.layers.patch_embed import PatchEmbed
from dinov2.layers.swiglu_ffn import SwiGLUFFN, SwiGLUFFNAligned, SwiGLUFFNFused

__all__ = [
    "Attention",
    "CausalAttentionBlock",
    "DINOHead",
    "LayerScale",
    "MemEffAttention",
    "Mlp",
    "NestedTensorBlock",
    "PatchEmbed",
    "SwiGLUFFN",
    "SwiGLUFFNAligned",
    "SwiGLUFFNFused",
]
