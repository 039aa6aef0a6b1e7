"""Activation checkpointing: a backward pass that computes values again instead of having kept them."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

MODES = ("none", "selective", "full")

_aten = torch.ops.aten
# What "selective" keeps: the matrix products and PyTorch's attention kernels of every device, which are most
# of the arithmetic. The explicit softmax attention is made of products, too.
KEPT = [
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten.baddbmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_fused_attention_overrideable.default,
]


def run(mode: str, function: Callable[..., Tensor], *arguments: object) -> Tensor:
    """Return ``function(*arguments)``, whose backward pass computes again what ``mode`` says.

    The second computation starts from the same random state, so it drops the same samples, and under the same
    autocast; gradients are those of ``none``. Without gradients all modes are the same.

    Args:
        mode: ``none``; ``selective``, which keeps the results of :data:`KEPT` and computes the rest again; or
            ``full``, which keeps the arguments alone.
        function: reads the tensors it changes nowhere else.
        arguments: tensors, and whatever else the function takes.
    """
    if mode == "none" or not torch.is_grad_enabled():
        return function(*arguments)
    options = {}
    if mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, KEPT)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=True, **options)
