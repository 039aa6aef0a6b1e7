"""One optimizer step: losses, gradients, clipping, the update of student and teacher."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dinov2 import distributed
from dinov2.data.unreadable import UNREADABLE, Failure
from dinov2.errors import UserError
from dinov2.fsdp import defer_gradient_reduction, reshard_fsdp_model
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
    images: dict[str, Any] | Sequence[dict[str, Any]],
    values: ScheduleValues,
    clip_grad: float | None,
    *,
    seed: Callable[[int], None] = lambda micro_batch: None,
) -> StepResult:
    """Do one optimizer step and move the teacher; nothing moves if a loss or gradient is not finite.

    Args:
        model: networks, prepared for training.
        optimizer: of the student.
        images: a collated batch, or the micro-batches that are accumulated.
        values: of the schedules.
        clip_grad: largest gradient norm of a submodule; falsy for no clipping.
        seed: called with the number of a micro-batch before the student sees it.
    """
    micro_batches = [images] if isinstance(images, Mapping) else images
    unreadable = torch.tensor(float(len(unreadable_images(micro_batches))), device=model.device)
    apply_optim_scheduler(
        optimizer,
        values.lr,
        values.weight_decay,
        values.last_layer_lr,
        backbone_lr_factor=values.backbone_lr_factor,
    )
    optimizer.zero_grad(set_to_none=True)

    losses = _accumulate_gradients(model, micro_batches, values.teacher_temp, seed)
    reshard_fsdp_model(model.student)  # a frozen backbone has had no backward pass to do it
    average_gradients(model.student.parameters())
    # Read only now: waiting for the values before the backward pass would leave a GPU idle.
    reduced = reduce_losses({**losses, UNREADABLE: unreadable})
    unreadable_sum = round(reduced.pop(UNREADABLE) * distributed.get_global_size())
    _require_finite(reduced, "loss")
    if model.fp16_scaler is not None:
        model.fp16_scaler.unscale_(optimizer)
    norms = {name: norm.item() for name, norm in clip_gradients(model.student, clip_grad).items()}
    stepped = _step_optimizer(model, optimizer, norms)
    if stepped:
        model.update_teacher(values.momentum)
    return StepResult(reduced, norms, stepped, unreadable_sum)


def unreadable_images(micro_batches: Sequence[Mapping[str, Any]]) -> list[Failure]:
    """Return what could not be read for the micro-batches of a step."""
    return [failure for images in micro_batches for failure in images.get(UNREADABLE, ())]


def _accumulate_gradients(
    model: SSLMetaArch,
    micro_batches: Sequence[dict[str, Any]],
    teacher_temp: float,
    seed: Callable[[int], None],
) -> dict[str, torch.Tensor]:
    """Add the gradients of the mean loss of all micro-batches, and return the mean of what is logged."""
    count = len(micro_batches)
    means: dict[str, torch.Tensor] = {}
    for number, losses in enumerate(model.micro_batch_losses(micro_batches, teacher_temp, seed)):
        if count > 1:
            defer_gradient_reduction(model.student, number < count - 1)
        model.backprop_loss(losses.total / count)
        for name, value in {**losses.logged, "total_loss": losses.total.detach()}.items():
            means[name] = means.get(name, 0.0) + value / count
    return means


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
