"""Sharded networks: gradients of several backward passes reduced once, and blocks that recompute."""

from functools import partial

import torch
from omegaconf import OmegaConf
from torch.distributed.tensor import DTensor

from dinov2 import distributed
from dinov2.fsdp import defer_gradient_reduction, get_fsdp_wrapper
from dinov2.models.vision_transformer import DinoVisionTransformer
from tests.distributed.launch import run_in_processes


def build(mode):
    torch.manual_seed(0)
    model = DinoVisionTransformer(
        img_size=16, patch_size=8, embed_dim=12, depth=2, num_heads=2, init_values=0.5, block_chunks=0
    )
    for block in model.blocks:
        block.recompute = mode
    return model


def gradients(model, images, deferred=False):
    """Mean gradients of two images, one backward pass each, over all processes."""
    messages = 0
    # The name depends on PyTorch's version.
    reducers = {
        name: getattr(torch.distributed, name)
        for name in ("reduce_scatter_tensor", "reduce_scatter_single")
        if hasattr(torch.distributed, name)
    }

    def counted(real, *arguments, **options):
        nonlocal messages
        messages += 1
        return real(*arguments, **options)

    for name, real in reducers.items():
        setattr(torch.distributed, name, partial(counted, real))
    try:
        for number, image in enumerate(images):
            if deferred:
                defer_gradient_reduction(model, number < len(images) - 1)
            (model(image, is_training=True)["x_norm_patchtokens"].sin().sum() / len(images)).backward()
    finally:
        for name, real in reducers.items():
            setattr(torch.distributed, name, real)
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    whole = {
        name: (grad.full_tensor() if isinstance(grad, DTensor) else grad).clone()
        for name, grad in found.items()
        if grad is not None
    }
    return whole, messages


def pictures():
    return torch.randn(4, 1, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def sharded(mode):
    """Messages, and the largest distance from the gradients of one process, with and without deferring."""
    alone, _ = gradients(build(mode), pictures())
    model = build(mode)
    formats = {"param_dtype": "fp32", "reduce_dtype": "fp32"}
    cfg = OmegaConf.create({"sharding_strategy": "SHARD_GRAD_OP", "mixed_precision": formats})
    get_fsdp_wrapper(cfg, {type(model.blocks[0])})(model)
    rank = distributed.get_global_rank()
    outcome = []
    for deferred in (False, True):
        found, messages = gradients(model, pictures()[2 * rank : 2 * rank + 2], deferred)
        assert found.keys() == alone.keys()
        distance = max(float((found[name] - gradient).abs().max()) for name, gradient in alone.items())
        outcome.append((messages, distance, max(float(g.abs().max()) for g in alone.values())))
        model.zero_grad()
    return outcome


def all_modes():
    return {mode: sharded(mode) for mode in ("none", "selective", "full")}


def test_one_reduction_gives_the_gradients_of_the_whole_batch():
    for of_process in run_in_processes(all_modes):
        for mode, ((each_time, far, size), (once, far_deferred, _)) in of_process.items():
            assert 2 * once == each_time > 0, mode
            assert max(far, far_deferred) < 1e-5 * size, mode
