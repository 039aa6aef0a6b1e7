"""Sharding of a finished module over the processes, and the run-state checkpoints.

This is the only place that knows how modules are sharded: PyTorch's ``fully_shard`` (FSDP2), whose
parameters keep their names and which runs on a CPU, too. Without a process group nothing is sharded.
"""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp import sharded_grad_scaler as torch_scaler

from dinov2 import distributed
from dinov2.errors import ConfigError, nearest
from dinov2.fsdp.checkpointer import FSDPCheckpointer, rankstr

__all__ = [
    "FSDPCheckpointer",
    "ShardedGradScaler",
    "free_if_fsdp",
    "get_fsdp_modules",
    "get_fsdp_wrapper",
    "is_fsdp",
    "is_sharded_fsdp",
    "rankstr",
    "reshard_fsdp_model",
]

# Strategy -> whether parameters are freed again between the forward and the backward pass.
RESHARD_AFTER_FORWARD = {"NO_SHARD": None, "SHARD_GRAD_OP": False, "FULL_SHARD": True}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def get_fsdp_wrapper(
    model_cfg: Any, modules_to_wrap: Collection[type[nn.Module]] = frozenset()
) -> Callable[[nn.Module], nn.Module]:
    """Return a function that shards a module in place and returns it.

    Every process must hold equal values beforehand: ``fully_shard`` does not broadcast. The teacher should
    be brought back with :func:`reshard_fsdp_model` before it is averaged with the student, because
    ``SHARD_GRAD_OP`` leaves it unsharded after a forward pass.

    Args:
        model_cfg: One entry of ``compute_precision``: ``sharding_strategy`` (``NO_SHARD``, ``SHARD_GRAD_OP``
            or ``FULL_SHARD``) and ``mixed_precision`` with ``param_dtype`` and ``reduce_dtype`` (``fp32``,
            ``fp16`` or ``bf16``). ``buffer_dtype`` has no effect: buffers keep the type they have.
        modules_to_wrap: Types of submodules that become sharding units of their own.

    Raises:
        ConfigError: The strategy or a precision is unknown.
    """
    reshard = _lookup(RESHARD_AFTER_FORWARD, model_cfg.sharding_strategy, "sharding_strategy")
    policy = MixedPrecisionPolicy(
        param_dtype=_lookup(DTYPES, model_cfg.mixed_precision.param_dtype, "mixed_precision.param_dtype"),
        reduce_dtype=_lookup(DTYPES, model_cfg.mixed_precision.reduce_dtype, "mixed_precision.reduce_dtype"),
    )

    def wrap(module: nn.Module) -> nn.Module:
        if reshard is None or not distributed.is_enabled():
            return module
        for child in module.modules():
            if child is not module and isinstance(child, tuple(modules_to_wrap)):
                fully_shard(child, mp_policy=policy, reshard_after_forward=reshard)
        return fully_shard(module, mp_policy=policy, reshard_after_forward=reshard)

    return wrap


def _lookup(table: dict[str, Any], name: str, key: str) -> Any:
    if name not in table:
        raise ConfigError(f'{key} is "{name}"{nearest(name, table)}, but must be one of {", ".join(table)}')
    return table[name]


def is_fsdp(x: nn.Module) -> bool:
    """Return whether ``x`` itself is a sharding unit."""
    return isinstance(x, FSDPModule)


def is_sharded_fsdp(x: nn.Module) -> bool:
    """Return whether ``x`` is a sharding unit whose parameters are really spread over several processes."""
    return is_fsdp(x) and distributed.get_global_size() > 1


def free_if_fsdp(x: nn.Module) -> None:
    """Give back the gathered parameters of ``x``, if it is a sharding unit."""
    if is_sharded_fsdp(x):
        x.reshard()


def get_fsdp_modules(x: nn.Module) -> list[nn.Module]:
    """Return the sharding units inside ``x``, ``x`` included."""
    return [module for module in x.modules() if is_fsdp(module)]


def reshard_fsdp_model(x: nn.Module) -> None:
    """Give back the gathered parameters of every sharding unit inside ``x``."""
    for module in get_fsdp_modules(x):
        free_if_fsdp(module)


class ShardedGradScaler(torch_scaler.ShardedGradScaler):
    """PyTorch's loss scaler that agrees over all processes whether a gradient overflowed.

    Unlike PyTorch's it also runs without a process group, and by default on the CPU where there is no CUDA.
    """

    def __init__(self, device: str | None = None, **options: Any) -> None:
        super().__init__(device or ("cuda" if torch.cuda.is_available() else "cpu"), **options)

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the scale and note, for all processes, whether one is not finite."""
        if distributed.is_enabled():
            super().unscale_(optimizer)
        else:
            torch.amp.GradScaler.unscale_(self, optimizer)
