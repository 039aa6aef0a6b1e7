"""Loss scaling for fp16 that works on shards, and agrees over the processes."""

from types import SimpleNamespace
from typing import Any

import torch
from torch.distributed.fsdp import sharded_grad_scaler as torch_scaler

from dinov2 import distributed
from dinov2.fsdp.sharding import local_part


class ShardedGradScaler(torch_scaler.ShardedGradScaler):
    """PyTorch's loss scaler that agrees over all processes whether a gradient overflowed.

    Unlike PyTorch's it takes sharded and whole gradients in one optimizer, runs without a process group, and
    is by default on the CPU where there is no CUDA.
    """

    def __init__(self, device: str | None = None, **options: Any) -> None:
        super().__init__(device or ("cuda" if torch.cuda.is_available() else "cpu"), **options)

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the scale and note, for all processes, whether one is not finite."""
        if distributed.is_enabled():
            super().unscale_(optimizer)
        else:
            torch.amp.GradScaler.unscale_(self, optimizer)

    def _unscale_grads_(self, optimizer: torch.optim.Optimizer, *options: Any) -> dict[torch.device, Any]:
        """Unscale what this process holds: sharded and whole tensors cannot be mixed in one operation."""
        gradients = [
            local_part(parameter.grad)
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        held = [SimpleNamespace(grad=gradient) for gradient in gradients if gradient.numel()]
        return super()._unscale_grads_(SimpleNamespace(param_groups=[{"params": held}]), *options)
