"""A checksum over tensors rather than over a file, so that it can travel inside the file it protects."""

import hashlib
import sys
from collections.abc import Iterable

import torch
from torch import Tensor

DIGEST_KEY = "dinov2_tensors_sha256"  # of the metadata of a safetensors file; no other program writes it


def tensors_digest(items: Iterable[tuple[str, Tensor]]) -> str:
    """Return the SHA-256 of named tensors: of their names, dtypes, shapes and values.

    Each tensor adds its name, dtype (such as ``float32``) and shape (such as ``384,3,14,14``), each ended by
    a zero byte, and its values as little-endian bytes in row-major order.

    Args:
        items: Name and tensor, sorted by name. Only one tensor is looked at at a time, so that a file larger
            than memory can be read through.

    Returns:
        64 hexadecimal digits.

    Raises:
        ValueError: The names are not in ascending order or one comes twice; the digest depends on the order.
    """
    digest, previous = hashlib.sha256(), None
    for name, tensor in items:
        if previous is not None and name <= previous:
            raise ValueError(f'"{name}" comes after "{previous}": tensors must be sorted by name')
        dtype, shape = str(tensor.dtype).removeprefix("torch."), ",".join(map(str, tensor.shape))
        digest.update(f"{name}\0{dtype}\0{shape}\0".encode())
        digest.update(_little_endian_bytes(tensor).numpy())
        previous = name
    return digest.hexdigest()


def _little_endian_bytes(tensor: Tensor) -> Tensor:
    """Return the values as bytes ``[count]``; NumPy knows no bfloat16, but every tensor can be viewed so."""
    values = tensor.detach().cpu().contiguous().reshape(-1, 1).view(torch.uint8)
    return values if sys.byteorder == "little" else values.flip(1)
