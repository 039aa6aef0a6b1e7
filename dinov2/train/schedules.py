"""The five scheduled values of a run, as pure functions of the iteration."""

from dataclasses import dataclass
from typing import NamedTuple

from omegaconf import DictConfig

from dinov2.train.run_length import total_iterations
from dinov2.utils.schedule import CosineScheduler


@dataclass(frozen=True)
class ScheduleValues:
    """What one iteration uses."""

    lr: float
    weight_decay: float
    momentum: float
    teacher_temp: float
    last_layer_lr: float
    backbone_lr_factor: float = 1.0  # see dinov2.train.freezing.BackboneStart


class Schedules(NamedTuple):
    """One scheduler per value; the order is that of DINOv2's ``build_schedulers``."""

    lr: CosineScheduler
    weight_decay: CosineScheduler
    momentum: CosineScheduler
    teacher_temp: CosineScheduler
    last_layer_lr: CosineScheduler

    def at(self, iteration: int) -> ScheduleValues:
        """Return all values for a zero-based iteration."""
        return ScheduleValues(*(schedule[iteration] for schedule in self))


def build_schedulers(cfg: DictConfig) -> Schedules:
    """Build the schedules of a resolved config (``optim.lr`` scaled, run length known).

    Warm-ups, freezing and the teacher's temperature are given in epochs of ``OFFICIAL_EPOCH_LENGTH``.
    """
    epoch = cfg.train.OFFICIAL_EPOCH_LENGTH
    total = total_iterations(cfg)
    lr = {
        "base_value": cfg.optim.lr,
        "final_value": cfg.optim.min_lr,
        "total_iters": total,
        "warmup_iters": cfg.optim.warmup_epochs * epoch,
        "start_warmup_value": 0,
    }
    temp_warmup = cfg.teacher.warmup_teacher_temp_epochs * epoch
    last_layer_lr = CosineScheduler(**lr)
    last_layer_lr.schedule[: cfg.optim.freeze_last_layer_epochs * epoch] = 0
    return Schedules(
        lr=CosineScheduler(**lr),
        weight_decay=CosineScheduler(cfg.optim.weight_decay, cfg.optim.weight_decay_end, total),
        momentum=CosineScheduler(cfg.teacher.momentum_teacher, cfg.teacher.final_momentum_teacher, total),
        teacher_temp=CosineScheduler(
            cfg.teacher.teacher_temp,
            cfg.teacher.teacher_temp,
            total_iters=temp_warmup,
            warmup_iters=temp_warmup,
            start_warmup_value=cfg.teacher.warmup_teacher_temp,
        ),
        last_layer_lr=last_layer_lr,
    )
