"""Sharded networks: gradients of several backward passes reduced once, and blocks that recompute."""

import pytest
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
    """Gradients of the mean loss, one backward pass per image, and whether the first one's were reduced."""
    reduced_early = False
    for number, image in enumerate(images):
        if deferred:
            defer_gradient_reduction(model, number < len(images) - 1)
        (model(image, is_training=True)["x_norm_patchtokens"].sin().sum() / len(images)).backward()
        if number == 0:
            # Gathered parameters keep whole gradients until they are reduced.
            reduced_early = any(isinstance(parameter.grad, DTensor) for parameter in model.parameters())
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    whole = {
        name: (grad.full_tensor() if isinstance(grad, DTensor) else grad).clone()
        for name, grad in found.items()
        if grad is not None
    }
    return whole, reduced_early


def pictures():
    return torch.randn(4, 1, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def sharded(mode):
    """Whether the first pass reduced, and the distance from one process, without and with deferring."""
    alone, _ = gradients(build(mode), pictures())
    model = build(mode)
    formats = {"param_dtype": "fp32", "reduce_dtype": "fp32"}
    cfg = OmegaConf.create({"sharding_strategy": "SHARD_GRAD_OP", "mixed_precision": formats})
    get_fsdp_wrapper(cfg, {type(model.blocks[0])})(model)
    rank = distributed.get_global_rank()
    outcome = []
    for deferred in (False, True):
        found, reduced_early = gradients(model, pictures()[2 * rank : 2 * rank + 2], deferred)
        assert found.keys() == alone.keys()
        distance = max(float((found[name] - gradient).abs().max()) for name, gradient in alone.items())
        outcome.append((reduced_early, distance, max(float(g.abs().max()) for g in alone.values())))
        model.zero_grad()
    return outcome


def all_modes():
    return {mode: sharded(mode) for mode in ("none", "selective", "full")}


@pytest.mark.slow
def test_one_reduction_gives_the_gradients_of_the_whole_batch():
    for of_process in run_in_processes(all_modes):
        for mode, ((at_once, far, size), (early, far_deferred, _)) in of_process.items():
            assert at_once and not early, mode
            assert max(far, far_deferred) < 1e-5 * size, mode
