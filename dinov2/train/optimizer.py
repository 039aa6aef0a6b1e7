"""AdamW on fused parameter groups, and what happens to gradients before its step."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dinov2 import distributed
from dinov2.fsdp.sharding import whole_tensor

# Gradients are averaged over ranks in pieces of this many elements: few messages, bounded extra memory.
BUCKET_ELEMENTS = 8 * 2**20


def build_optimizer(cfg: DictConfig, params_groups: list[dict[str, Any]]) -> torch.optim.AdamW:
    """Return AdamW; learning rate and weight decay are set every iteration by the schedules."""
    return torch.optim.AdamW(params_groups, betas=(cfg.optim.adamw_beta1, cfg.optim.adamw_beta2))


def apply_optim_scheduler(
    optimizer: torch.optim.Optimizer,
    lr: float,
    wd: float,
    last_layer_lr: float,
    *,
    backbone_lr_factor: float = 1.0,
) -> None:
    """Set each group's learning rate and weight decay from the scheduled values and its multipliers."""
    for group in optimizer.param_groups:
        base_lr = last_layer_lr if group["is_last_layer"] else lr
        group["lr"] = base_lr * group["lr_multiplier"]
        if group.get("is_backbone", False):
            group["lr"] *= backbone_lr_factor
        group["weight_decay"] = wd * group["wd_multiplier"]


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace gradients by their mean over ranks; nothing to do without a process group.

    Those of sharded parameters are left alone: the backward pass has averaged them already.
    """
    if not distributed.is_enabled():
        return
    # Every rank runs the same networks on every step, so a parameter without a gradient has none anywhere.
    bucket: list[Tensor] = []
    elements = 0
    for parameter in parameters:
        if parameter.grad is None or isinstance(parameter.grad, DTensor):
            continue
        bucket.append(parameter.grad)
        elements += parameter.grad.numel()
        if elements >= BUCKET_ELEMENTS:
            _average(bucket)
            bucket, elements = [], 0
    if bucket:
        _average(bucket)


def _average(gradients: list[Tensor]) -> None:
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= distributed.get_global_size()
    pieces = flat.split([gradient.numel() for gradient in gradients])
    for gradient, piece in zip(gradients, pieces, strict=True):
        gradient.copy_(piece.view_as(gradient))


def clip_gradients(submodules: nn.ModuleDict, max_norm: float | None) -> dict[str, Tensor]:
    """Clip each submodule by its own gradient norm, as DINOv2 does; a falsy ``max_norm`` only measures.

    Returns:
        Submodule name -> scalar norm before clipping, the same on all ranks.
    """
    limit = max_norm or float("inf")
    return {
        name: whole_tensor(nn.utils.clip_grad_norm_(module.parameters(), limit))
        for name, module in submodules.items()
    }
