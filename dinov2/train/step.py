"""One optimizer step: losses, gradients, clipping, the update of student and teacher."""

import math
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

STOP = "stop_requested"  # among the scalars that are summed over ranks


class NonFiniteLossError(UserError, FloatingPointError):
    """Losses or gradients stay inf or NaN; raised on every rank, no weight has been changed by them."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step reports, averaged over ranks."""

    losses: dict[str, float]  # DINOv2's entries, then total_loss: the value that was minimised
    grad_norms: dict[str, float]  # per student submodule, before clipping
    problem: str  # why the step was skipped on all ranks; empty if the weights have moved
    unreadable: int  # images that had to be replaced in the batches of all ranks, their sum
    stop_requested: bool = False  # by a signal, on any rank

    @property
    def stepped(self) -> bool:
        """Whether the weights have moved."""
        return not self.problem


def train_step(
    model: SSLMetaArch,
    optimizer: torch.optim.Optimizer,
    images: dict[str, Any] | Sequence[dict[str, Any]],
    values: ScheduleValues,
    clip_grad: float | None,
    *,
    seed: Callable[[int], None] = lambda micro_batch: None,
    stop_requested: bool = False,
    meanwhile: Callable[[], None] = lambda: None,
) -> StepResult:
    """Do one optimizer step and move the teacher; nothing moves if a loss or gradient is not finite.

    Args:
        model: networks, prepared for training.
        optimizer: of the student.
        images: a collated batch, or the micro-batches that are accumulated.
        values: of the schedules.
        clip_grad: largest gradient norm of a submodule; falsy for no clipping.
        seed: called with the number of a micro-batch before the student sees it.
        stop_requested: whether this process was asked to stop; comes back as whether any was.
        meanwhile: called when all gradients are asked for, before waiting for losses and norms.
    """
    micro_batches = [images] if isinstance(images, Mapping) else images
    unreadable = torch.full((), float(len(unreadable_images(micro_batches))), device=model.device)
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
    stop = torch.full_like(unreadable, float(stop_requested))
    reduced = mean_over_ranks({**losses, UNREADABLE: unreadable, STOP: stop})
    if model.fp16_scaler is not None:
        model.fp16_scaler.unscale_(optimizer)
    gradient_norms = clip_gradients(model.student, clip_grad)
    meanwhile()
    # Read only now, and all at once: waiting for values leaves a GPU idle.
    reduced, norms = read_values(reduced, gradient_norms)
    unreadable_sum = round(reduced.pop(UNREADABLE) * distributed.get_global_size())
    any_stop = reduced.pop(STOP) > 0
    problem = _step_optimizer(model, optimizer, reduced, norms)
    if not problem:
        model.update_teacher(values.momentum)
    return StepResult(reduced, norms, problem, unreadable_sum, any_stop)


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
    model: SSLMetaArch,
    optimizer: torch.optim.Optimizer,
    losses: dict[str, float],
    grad_norms: dict[str, float],
) -> str:
    """Step unless something is not finite, and return what that is; the same on every rank.

    Losses and norms are those over all ranks, so one bad value on one rank is seen by all of them. What the
    teacher's logits would have done to the running centre is dropped with the step, except for gradients that
    overflow fp16, which says nothing about the teacher.
    """
    scaler = model.fp16_scaler
    problem = not_finite(losses, "loss")
    if scaler is None:
        problem = problem or not_finite(grad_norms, "gradient norm")
    if problem:
        model.discard_center_updates()
    elif scaler is None:
        optimizer.step()
    if scaler is None:
        return problem
    scale = scaler.get_scale()
    if not problem:
        scaler.step(optimizer)
    scaler.update()
    if not problem and scaler.get_scale() < scale:
        return f"gradients overflowed fp16 at a loss scale of {scale:g}"
    return problem


def mean_over_ranks(scalars: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Average scalars over ranks with one collective; they stay on their device."""
    stacked = torch.stack([value.float() for value in scalars.values()])
    distributed.all_reduce_sum_(stacked)
    return dict(zip(scalars, (stacked / distributed.get_global_size()).unbind(), strict=True))


def read_values(*groups: dict[str, torch.Tensor]) -> list[dict[str, float]]:
    """Bring scalars of one device to the host in one transfer."""
    tensors = [value for group in groups for value in group.values()]
    values = iter(torch.stack([tensor.float() for tensor in tensors]).tolist())
    return [{name: next(values) for name in group} for group in groups]


def not_finite(values: dict[str, float], what: str) -> str:
    """Return a clause that names the values that are inf or NaN; an empty string if there is none."""
    listed = ", ".join(f"{name} {value:.6g}" for name, value in values.items() if not math.isfinite(value))
    return f"a {what} is not finite ({listed})" if listed else ""
