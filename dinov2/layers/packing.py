"""Several batches of token sequences in one tensor, so that per-token layers run once for all of them.

Shapes: b sequences of n tokens in one batch, T tokens over all batches, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedLayout:
    """How a packed tensor ``[1, T, D]`` divides into batches ``[b, n, D]``.

    Attributes:
        shapes: ``(b, n)`` of every batch in packing order.
    """

    shapes: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, batches: Sequence[Tensor]) -> "PackedLayout":
        """Return the layout of batches shaped ``[b, n, ...]``."""
        return cls(tuple((x.shape[0], x.shape[1]) for x in batches))

    @property
    def sizes(self) -> list[int]:
        """Tokens of every batch, ``b * n``."""
        return [b * n for b, n in self.shapes]

    @property
    def starts(self) -> list[int]:
        """Packed position of every batch's first token."""
        return [0, *accumulate(self.sizes)][:-1]

    def pack(self, batches: Sequence[Tensor]) -> Tensor:
        """Join batches ``[b, n, D]`` into ``[1, T, D]``; one batch is not copied."""
        flat = [x.reshape(1, -1, x.shape[-1]) for x in batches]
        return flat[0] if len(flat) == 1 else torch.cat(flat, dim=1)

    def split(self, packed: Tensor) -> list[Tensor]:
        """Undo :meth:`pack`: views ``[b, n, D]`` of ``[1, T, D]``."""
        parts = packed.split(self.sizes, dim=1)
        return [part.reshape(b, n, -1) for part, (b, n) in zip(parts, self.shapes, strict=True)]

    def packed_rows(self, positions: Sequence[Tensor]) -> list[Tensor]:
        """Turn, per batch, positions ``[k]`` in its flattened tokens ``[b * n]`` into packed positions."""
        return [rows + start for rows, start in zip(positions, self.starts, strict=True)]
