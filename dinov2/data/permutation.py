"""Random orders that need no memory: a keyed permutation of range(n), computed place by place.

It is a block cipher on range(n). Alternating Feistel rounds, x = (left, right) with left += f(right) and
right += f(left) in turn, make a permutation of any rectangle of numbers, whatever f is; with random f, three
rounds cannot be told from a random permutation (Luby & Rackoff, "How to construct pseudorandom permutations
from pseudorandom functions", SIAM J. Comput. 17, 1988), and more rounds hold for more draws. The rectangle
is the smallest near-square one of at least n places, and a result beyond n is permuted again until it falls
within (the generalized Feistel cipher and cycle walking of Black & Rogaway, "Ciphers with arbitrary finite
domains", CT-RSA 2002). The rectangle exceeds n by less than its side, so few results are.

A few numbers give such rounds too little to mix; up to ``TABLE_LIMIT`` of them are sorted by a random value
each. The aim is an even order, not secrecy.
"""

import math

import numpy as np

MAX_SIZE = 2**63
ROUNDS = 8  # even
TABLE_LIMIT = 4096

_WORD = 2**64
# The finalizer of SplitMix64 (Steele, Lea & Flood, "Fast splittable pseudorandom number generators", 2014).
_GOLDEN, _FIRST, _SECOND = (
    np.uint64(constant) for constant in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


class Permutation:
    """A random permutation of ``range(size)`` whose memory does not grow with the size.

    Calling it takes places and returns which number stands in each; any place costs the same.

    Args:
        size: 1 to 2**63.
        key: integers; each list of them, of one length, gives a permutation of its own.
    """

    def __init__(self, size: int, *key: int) -> None:
        assert 1 <= size <= MAX_SIZE, size
        self.size = size
        # Two 32-bit words each: SeedSequence alone would take (2**32,) and (0, 1) for the same.
        words = [word for part in key for word in divmod(part % _WORD, 2**32)]
        self._keys = np.random.SeedSequence(words).generate_state(ROUNDS, np.uint64)
        left = math.isqrt(size - 1) + 1
        self._left, self._right = np.uint64(left), np.uint64(-(-size // left))
        self._table = None
        if size <= TABLE_LIMIT:
            self._table = np.argsort(_mix(np.arange(size, dtype=np.uint64), self._keys[0]), kind="stable")

    def __len__(self) -> int:
        return self.size

    def __call__(self, places: np.ndarray) -> np.ndarray:
        """Return the numbers at ``places``.

        Args:
            places: integers of 0 to ``size - 1``, any shape.

        Returns:
            int64, of the same shape.
        """
        if self._table is not None:
            return self._table[places]
        values = self._permute_rectangle(np.asarray(places).astype(np.uint64))
        while (beyond := values >= self.size).any():
            values[beyond] = self._permute_rectangle(values[beyond])
        return values.astype(np.int64)

    def _permute_rectangle(self, values: np.ndarray) -> np.ndarray:
        left, right = np.divmod(values, self._right)
        for first, second in zip(self._keys[::2], self._keys[1::2], strict=True):
            left = _add(left, _random(right, first, self._left), self._left)
            right = _add(right, _random(left, second, self._right), self._right)
        return left * self._right + right


def _random(values: np.ndarray, key: np.uint64, bound: np.uint64) -> np.ndarray:
    """A random function of ``values`` to ``range(bound)``; bound is below 2**32."""
    # The upper half times the bound, shifted back: an even choice without a division.
    return (_mix(values, key) >> np.uint64(32)) * bound >> np.uint64(32)


def _mix(values: np.ndarray, key: np.uint64) -> np.ndarray:
    """A random 64-bit number for each value."""
    mixed = values * _GOLDEN + key
    mixed = (mixed ^ (mixed >> np.uint64(30))) * _FIRST
    mixed = (mixed ^ (mixed >> np.uint64(27))) * _SECOND
    return mixed ^ (mixed >> np.uint64(31))


def _add(values: np.ndarray, summands: np.ndarray, modulus: np.uint64) -> np.ndarray:
    total = values + summands
    return np.where(total >= modulus, total - modulus, total)
