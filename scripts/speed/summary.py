"""Medians with intervals, and how time and memory grow with the batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from statistics import fmean, median

LEVEL = 0.95


@dataclass(frozen=True)
class Median:
    """A median and the interval that holds the median of the population."""

    value: float
    low: float
    high: float
    level: float  # probability of the interval; below 0.95 where the values are too few for more

    @classmethod
    def of(cls, values: Sequence[float]) -> "Median":
        """Take order statistics, which ask nothing of the distribution (sign test).

        The interval is the narrowest symmetric one of at least 95 %, or from the least to the greatest value.
        """
        ordered, count = sorted(values), len(values)
        for cut in range((count - 1) // 2, -1, -1):
            level = 1 - 2 * sum(comb(count, k) for k in range(cut + 1)) / 2**count
            if level >= LEVEL or cut == 0:
                return cls(median(ordered), ordered[cut], ordered[count - 1 - cut], max(level, 0.0))
        raise ValueError("there is no median of nothing")

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f}, {self.level:.0%})"


@dataclass(frozen=True)
class Rung:
    """A batch size, the seconds that each image took, and the peak of memory."""

    batch: int
    seconds_per_image: float
    peak_bytes: int


@dataclass(frozen=True)
class Growth:
    """How far a ladder of batch sizes is from constant time per image and from memory linear in the batch."""

    time_spread: float  # largest over smallest time per image, less 1
    bytes_per_image: float  # slope of the line through the peaks
    fixed_bytes: float  # its value at no images
    memory_error: float  # largest distance from the line, as a share of the peak

    @classmethod
    def of(cls, rungs: Sequence[Rung]) -> "Growth":
        """Fit a line by least squares; two rungs at least."""
        times = [rung.seconds_per_image for rung in rungs]
        batches, peaks = [float(rung.batch) for rung in rungs], [float(rung.peak_bytes) for rung in rungs]
        center, level = fmean(batches), fmean(peaks)
        spread = sum((batch - center) ** 2 for batch in batches)
        pairs = zip(batches, peaks, strict=True)
        slope = sum((batch - center) * (peak - level) for batch, peak in pairs) / spread
        fixed = level - slope * center
        errors = [
            abs(fixed + slope * batch - peak) / peak for batch, peak in zip(batches, peaks, strict=True)
        ]
        return cls(max(times) / min(times) - 1, slope, fixed, max(errors))
