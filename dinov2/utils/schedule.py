"""A value that changes over a run as a function of the iteration alone, so that resuming needs no state."""

import numpy as np


class CosineScheduler:
    """Zeros, then a linear warm-up, then half a cosine; constant at ``final_value`` after the end.

    Args:
        base_value: value at the end of the warm-up.
        final_value: value from ``total_iters`` on.
        total_iters: length of the whole schedule, iterations.
        warmup_iters: length of the linear part, both ends included, iterations.
        start_warmup_value: first value of the linear part.
        freeze_iters: leading iterations with value 0.

    Raises:
        ValueError: if the frozen part and the warm-up are longer than the schedule.

    Example:
        >>> schedule = CosineScheduler(1.0, 0.0, total_iters=10, warmup_iters=3)
        >>> schedule[0], schedule[2], schedule[10]
        (0.0, 1.0, 0.0)
    """

    def __init__(
        self,
        base_value: float,
        final_value: float,
        total_iters: int,
        warmup_iters: int = 0,
        start_warmup_value: float = 0,
        freeze_iters: int = 0,
    ) -> None:
        cosine_iters = total_iters - warmup_iters - freeze_iters
        if cosine_iters < 0:
            raise ValueError(
                f"A schedule of {total_iters} iterations cannot hold {freeze_iters} frozen and "
                f"{warmup_iters} warm-up iterations; lengthen the run or shorten these."
            )
        self.final_value = final_value
        self.total_iters = total_iters
        progress = np.arange(cosine_iters) / max(cosine_iters, 1)
        cosine = final_value + 0.5 * (base_value - final_value) * (1 + np.cos(np.pi * progress))
        warmup = np.linspace(start_warmup_value, base_value, warmup_iters)
        self.schedule = np.concatenate([np.zeros(freeze_iters), warmup, cosine])

    def __getitem__(self, iteration: int) -> float:
        if iteration >= self.total_iters:
            return float(self.final_value)
        return float(self.schedule[iteration])
