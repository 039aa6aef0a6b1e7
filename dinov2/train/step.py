"""One optimizer step: losses, gradients, clipping, the update of student and teacher."""

from dataclasses import dataclass
from typing import Any

import torch

from dinov2 import distributed
from dinov2.data.unreadable import UNREADABLE
from dinov2.errors import UserError
from dinov2.fsdp import reshard_fsdp_model
from dinov2.train.optimizer import apply_optim_scheduler, average_gradients, clip_gradients
from dinov2.train.schedules import ScheduleValues
from dinov2.train.ssl_meta_arch import SSLMetaArch


class NonFiniteLossError(UserError, FloatingPointError):
    """A loss or gradient is inf or NaN; raised on every rank before any weight has moved."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step reports, averaged over ranks."""

    losses: dict[str, float]  # DINOv2's entries, then total_loss: the value that was minimised
    grad_norms: dict[str, float]  # per student submodule, before clipping
    stepped: bool  # False if the gradient scaler skipped the step
    unreadable: int  # images that had to be replaced in the batches of all ranks, their sum


def train_step(
    model: SSLMetaArch,
    optimizer: torch.optim.Optimizer,
    images: dict[str, Any],
    values: ScheduleValues,
    clip_grad: float | None,
) -> StepResult:
    """Do one optimizer step and move the teacher; nothing moves if a loss or gradient is not finite."""
    unreadable = torch.tensor(float(len(images.get(UNREADABLE, ()))), device=model.device)
    apply_optim_scheduler(
        optimizer,
        values.lr,
        values.weight_decay,
        values.last_layer_lr,
        backbone_lr_factor=values.backbone_lr_factor,
    )
    optimizer.zero_grad(set_to_none=True)

    losses = model.compute_losses(images, values.teacher_temp)
    model.backprop_loss(losses.total)
    reshard_fsdp_model(model.student)  # a frozen backbone has had no backward pass to do it
    average_gradients(model.student.parameters())
    # Read only now: waiting for the values before the backward pass would leave a GPU idle.
    reduced = reduce_losses({**losses.logged, "total_loss": losses.total.detach(), UNREADABLE: unreadable})
    unreadable_sum = round(reduced.pop(UNREADABLE) * distributed.get_global_size())
    _require_finite(reduced, "loss")
    if model.fp16_scaler is not None:
        model.fp16_scaler.unscale_(optimizer)
    norms = {name: norm.item() for name, norm in clip_gradients(model.student, clip_grad).items()}
    stepped = _step_optimizer(model, optimizer, norms)
    if stepped:
        model.update_teacher(values.momentum)
    return StepResult(reduced, norms, stepped, unreadable_sum)


def _step_optimizer(
    model: SSLMetaArch, optimizer: torch.optim.Optimizer, grad_norms: dict[str, float]
) -> bool:
    """Step, and tell whether the weights moved: with fp16, a gradient that overflows skips the step."""
    scaler = model.fp16_scaler
    if scaler is None:
        _require_finite(grad_norms, "gradient norm")
        optimizer.step()
        return True
    scale = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    return scaler.get_scale() >= scale


def reduce_losses(losses: dict[str, torch.Tensor]) -> dict[str, float]:
    """Average scalars over ranks with one collective and one transfer to the host."""
    stacked = torch.stack([value.float() for value in losses.values()])
    distributed.all_reduce_sum_(stacked)
    means = (stacked / distributed.get_global_size()).tolist()
    return dict(zip(losses, means, strict=True))


def _require_finite(values: dict[str, float], what: str) -> None:
    """Raise on every rank alike: the values are the same on all of them."""
    if all(abs(value) < float("inf") for value in values.values()):
        return
    listed = ", ".join(f"{name} {value:.6g}" for name, value in values.items())
    raise NonFiniteLossError(f"a {what} is not finite ({listed})")
