"""Random numbers for one image, drawn in one go: the same ones that torch would draw one call at a time.

A crop takes some sixteen numbers and torch's scalar calls cost microseconds each, which for ten crops is as
much as cutting half of them out. Here one call fetches raw words of torch's CPU generator (MT19937), and the
few rules by which torch makes a number of a word are applied in Python.
"""

import itertools
import struct
import sys
from functools import lru_cache

import numpy as np
import torch

WORDS = 256  # per fetch, an even number; ten crops take about 190
_MANTISSA = (1 << 24) - 1
_UNIT = 2.0**-24
_FLOAT32 = struct.Struct("f")  # rounds to float32 faster than numpy does


def _fetch() -> list[int]:
    """Return the next words of torch's generator."""
    # A 64-bit integer over the full range is two words, the first one in its upper half.
    pairs = torch.empty(WORDS // 2, dtype=torch.int64).random_(-(2**63), None)
    halves = pairs.numpy().view(np.uint32).reshape(-1, 2)
    upper_first = halves[:, ::-1] if sys.byteorder == "little" else halves
    return upper_first.ravel().tolist()


@lru_cache
def _span(low: float, high: float) -> tuple[float, float]:
    """Return start and width of a range as float32 has them."""
    start, end = np.float32(low), np.float32(high)
    return float(start), float(end - start)


class RandomStream:
    """Numbers of torch's global CPU generator, equal to those of torch's own calls in the same order.

    The generator itself moves on by ``WORDS`` at a time, further than the numbers taken from it.
    """

    def __init__(self) -> None:
        # An iterator that goes on for ever, so that taking a word costs one call.
        self._word = itertools.chain.from_iterable(iter(_fetch, None)).__next__

    def unit(self) -> float:
        """As ``torch.rand(1)``: in 0..1 without 1, a multiple of 2**-24."""
        return (self._word() & _MANTISSA) * _UNIT

    def uniform(self, low: float, high: float) -> float:
        """As ``torch.empty(1).uniform_(low, high)``, in float32."""
        start, width = _span(low, high)
        number = (self._word() & _MANTISSA) * _UNIT * width + start
        return _FLOAT32.unpack(_FLOAT32.pack(number))[0]

    def below(self, limit: int) -> int:
        """As ``torch.randint(limit, (1,))`` for limits under 2**28."""
        return self._word() % limit

    def permutation(self, count: int) -> list[int]:
        """As ``torch.randperm(count)``."""
        items = list(range(count))
        for place in range(count - 1):
            other = place + self._word() % (count - place)
            items[place], items[other] = items[other], items[place]
        return items
