"""What tells one backbone from another: a checksum of its weights, and the settings that are not in them."""

import hashlib
from typing import Any

import torch
from torch import nn

from dinov2 import distributed
from dinov2.models.conversion import flat_name

# Attributes of a vision transformer that change its features and have no trace in its weights.
SETTINGS = ("num_heads", "patch_size", "num_register_tokens", "interpolate_offset", "interpolate_antialias")
# Only masked images use it, and several releases leave it out.
UNUSED = "mask_token"


def weights_sha256(model: nn.Module) -> str:
    """Return the SHA-256 of a model's tensors: names, types, shapes and values.

    The same weights have the same checksum whatever file they came from, with and without block chunks.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted((flat_name(name), tensor) for name, tensor in model.state_dict().items()):
        if name == UNUSED:
            continue
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def identity_of(model: nn.Module) -> dict[str, Any]:
    """Return ``weights_sha256`` and the settings of a model; the main process computes it for all."""
    if not distributed.is_main_process():
        return distributed.broadcast_object({})
    settings = {name: getattr(model, name) for name in SETTINGS if hasattr(model, name)}
    return distributed.broadcast_object({"weights_sha256": weights_sha256(model), **settings})
