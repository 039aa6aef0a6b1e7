"""How the peak learning rate follows from `optim.base_lr` and the number of images per iteration."""

import math
import os
import re
from typing import Any

SCALING_RULE = re.compile(r"(?:(?P<law>sqrt|linear)_wrt_(?P<reference>[1-9]\d*))|none")


def total_batch(batch_size_per_gpu: int, accumulate_steps: int, processes: int) -> int:
    """Return the images that one optimizer step learns from, over all processes."""
    return batch_size_per_gpu * accumulate_steps * processes


def images_per_iteration(cfg: Any, processes: int) -> int:
    """Return :func:`total_batch` of a resolved config."""
    return total_batch(cfg.train.batch_size_per_gpu, cfg.optim.accumulate_steps, processes)


def scaled_lr(base_lr: float, rule: str, total_batch: int) -> float:
    """Return the peak learning rate of a total batch.

    Args:
        base_lr: Learning rate at the reference batch N.
        rule: ``sqrt_wrt_<N>`` (base_lr * sqrt(batch / N)) or ``linear_wrt_<N>`` (base_lr * batch / N).
        total_batch: Images per iteration over all processes.
    """
    parts = SCALING_RULE.fullmatch(rule)
    assert parts is not None and parts["law"] is not None, rule
    share = total_batch / int(parts["reference"])
    return base_lr * (math.sqrt(share) if parts["law"] == "sqrt" else share)


def is_scaled(lr: float, base_lr: float, rule: str, batch_size: int, accumulate_steps: int = 1) -> bool:
    """Whether ``lr`` is what the rule makes of ``base_lr`` for the number of processes launched.

    Such a value stands in the ``config.yaml`` that a run wrote, which may serve as config file again.
    """
    stated = os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or ""
    processes = int(stated) if stated.isdecimal() else 1
    expected = scaled_lr(base_lr, rule, total_batch(batch_size, accumulate_steps, processes))
    return math.isclose(lr, expected, rel_tol=1e-6)
