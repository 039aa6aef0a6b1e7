"""Attention of short sequences in bfloat16 on a CPU, whose gradients PyTorch computes slowly.

Forwards its kernel runs. Its backward kernel took 0.45 ms for a sequence of 50 tokens and six heads; the
products that the gradients consist of, one after the other, take 0.13 (docs/performance.md).

Shapes: B batch, H heads, N tokens, E width of one head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Of a sequence. Measured to be faster with 37 to 300, while PyTorch's kernel was with 5 and with 401.
TOKENS = range(32, 301)
# Scores of float32 that are computed at once, so that they stay in a core's cache.
SCORES = 2**18


def pays(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Return whether :func:`short_attention` is the faster way to gradients; not in code that is traced."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False  # a compiler would write out a copy for every sequence
    wanted = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    short = q.shape[-2] in TOKENS and q.shape == k.shape == v.shape
    if not wanted or not short or q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return False
    return torch.backends.cpu.get_cpu_capability() == "AVX512"  # what was measured, with bf16 instructions


class _ShortAttention(torch.autograd.Function):
    @staticmethod
    def forward(q, k, v):
        return F.scaled_dot_product_attention(q, k, v)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        if torch.is_grad_enabled():
            raise RuntimeError('attention has no second derivatives here; the backend "math" has')
        q, k, v = ctx.saved_tensors
        batch, heads, tokens, width = q.shape
        step = max(SCORES // (heads * tokens**2), 1)
        # In the layout of a joint projection, which joins the three without moving them.
        joint = torch.empty(batch, tokens, 3, heads, width, dtype=q.dtype)
        found = joint.permute(2, 0, 3, 1, 4)
        with torch.autocast("cpu", enabled=False):
            for start in range(0, batch, step):
                some = slice(start, start + step)
                parts = [tensor[some].contiguous() for tensor in (q, k, v, gradient)]
                for whole, part in zip(found, _gradients(*parts), strict=True):
                    whole[some] = part
        return tuple(found)


def _gradients(q: Tensor, k: Tensor, v: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients of queries, keys and values; weights and their gradients are float32."""
    scale = q.shape[-1] ** -0.5
    weights = torch.softmax((q.float() * scale) @ k.float().transpose(-2, -1), dim=-1)
    of_weights = (gradient @ v.transpose(-2, -1)).float()
    # Through the softmax: what all weights of a query have in common changes nothing.
    common = torch.sum(of_weights * weights, dim=-1, keepdim=True)
    of_scores = ((of_weights - common) * weights).mul_(scale).to(q.dtype)
    of_values = weights.to(q.dtype).transpose(-2, -1) @ gradient
    return of_scores @ k, of_scores.transpose(-2, -1) @ q, of_values


def short_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute ``softmax(q k^T / sqrt(E)) v``.

    Args:
        q, k, v: queries, keys and values, each ``[B, H, N, E]`` on a CPU, any strides.

    Returns:
        ``[B, H, N, E]``, with first derivatives.
    """
    return _ShortAttention.apply(q, k, v)
