"""The single attention entry and the kernels behind it.

The kernel is chosen per call from the tensors at hand, never at import, so an installed xFormers does not
break CPU tensors. xFormers is imported only when its kernel is asked for.

Shapes: B batch, H heads, N tokens, E width of one head.
"""

import importlib.util
import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2.errors import ConfigError, nearest
from dinov2.layers.short_attention import pays, short_attention

XFORMERS_ENABLED = os.environ.get("XFORMERS_DISABLED") is None
XFORMERS_AVAILABLE = XFORMERS_ENABLED and importlib.util.find_spec("xformers") is not None


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Compute ``softmax(q k^T / sqrt(E)) v``.

    Args:
        q, k, v: queries, keys and values, each ``[B, H, N, E]``, any strides.
        is_causal: let token i see tokens 0..i only.
        dropout_p: probability of dropping an attention weight, 0..1; the caller passes 0 in evaluation.
        backend: ``auto`` (PyTorch's fused attention, on every device), ``sdpa`` (the same, by name),
            ``xformers`` (memory-efficient attention of xFormers, CUDA only) or ``math`` (explicit softmax,
            quadratic memory; the reference of the tests).

    Returns:
        ``[B, H, N, E]`` in the dtype of ``v``.

    Raises:
        ConfigError: the backend does not exist, or cannot serve these tensors.
    """
    try:
        kernel = BACKENDS[backend]
    except KeyError:
        raise ConfigError(
            f'attention backend "{backend}" does not exist{nearest(backend, BACKENDS)}; '
            f"use one of {', '.join(BACKENDS)}"
        ) from None
    return kernel(q, k, v, is_causal, dropout_p)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, dropout_p: float) -> Tensor:
    if not is_causal and not dropout_p and pays(q, k, v):
        return short_attention(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, dropout_p=dropout_p)


def _xformers(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, dropout_p: float) -> Tensor:
    if not XFORMERS_AVAILABLE:
        reason = "is not installed" if XFORMERS_ENABLED else "is switched off by XFORMERS_DISABLED"
        raise ConfigError(f'attention backend "xformers" was chosen but xFormers {reason}; use "auto"')
    if q.device.type != "cuda":
        raise ConfigError(
            f'attention backend "xformers" needs CUDA tensors but these are on {q.device.type}; use "auto"'
        )
    from xformers.ops import LowerTriangularMask, memory_efficient_attention

    bias = LowerTriangularMask() if is_causal else None
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # xFormers wants [B, N, H, E]
    return memory_efficient_attention(q, k, v, attn_bias=bias, p=dropout_p).transpose(1, 2)


def _math(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, dropout_p: float) -> Tensor:
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5  # [B, H, N, N]
    if is_causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(v.dtype)
    return F.dropout(weights, dropout_p) @ v


# xFormers 0.0.35 dispatches to the flash and memory-efficient kernels that PyTorch itself ships, so "auto"
# loses nothing by staying with PyTorch, and keeps one code path on every device and under torch.compile.
BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, bool, float], Tensor]] = {
    "auto": _sdpa,
    "sdpa": _sdpa,
    "xformers": _xformers,
    "math": _math,
}
