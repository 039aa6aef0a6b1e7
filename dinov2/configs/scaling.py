"""How the peak learning rate follows from `optim.base_lr` and the number of images per iteration."""

import math
import re

SCALING_RULE = re.compile(r"(?:(?P<law>sqrt|linear)_wrt_(?P<reference>[1-9]\d*))|none")


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


def is_scaled(lr: float, base_lr: float, rule: str, batch_size: int) -> bool:
    """Whether ``lr`` is what the rule makes of ``base_lr`` for some number of processes.

    Such a value stands in every ``config.yaml`` that a run wrote, which may serve as config file again.
    """
    single = scaled_lr(base_lr, rule, batch_size)
    if single == 0:
        return False
    processes = (lr / single) ** 2 if rule.startswith("sqrt") else lr / single
    return round(processes) >= 1 and math.isclose(processes, round(processes), rel_tol=1e-6)
