"""Sharding of finished modules over the processes, and the run-state checkpoints.

This is the only place that knows how modules are sharded. Without a process group nothing is.
"""

from dinov2.fsdp.checkpointer import FSDPCheckpointer, checkpoint_paths, rankstr
from dinov2.fsdp.grad_scaler import ShardedGradScaler
from dinov2.fsdp.layout import saved_iterations
from dinov2.fsdp.reading import read_checkpoint
from dinov2.fsdp.sharding import (
    defer_gradient_reduction,
    free_if_fsdp,
    get_fsdp_modules,
    get_fsdp_wrapper,
    is_fsdp,
    is_sharded_fsdp,
    reshard_fsdp_model,
)
from dinov2.fsdp.writing import SaveOutcome

__all__ = [
    "FSDPCheckpointer",
    "SaveOutcome",
    "ShardedGradScaler",
    "checkpoint_paths",
    "defer_gradient_reduction",
    "free_if_fsdp",
    "get_fsdp_modules",
    "get_fsdp_wrapper",
    "is_fsdp",
    "is_sharded_fsdp",
    "saved_iterations",
    "rankstr",
    "read_checkpoint",
    "reshard_fsdp_model",
]
