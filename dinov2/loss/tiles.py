"""Walking over a wide matrix of scores a few rows at a time.

A pass over [n, K] scores with K of 65,536 moves gigabytes if every operation writes its result to memory.
Done tile by tile, all operations on a tile find it in the processor's cache, and only the scores travel.
"""

from collections.abc import Iterator

import torch

# Bytes of one float32 tile, of which three or four are alive at once. On a CPU they stay in its caches. A GPU
# takes five times as long with 2**22 as with 2**27, where a kernel lasts longer than it takes to start one.
TILE_BYTES = {"cpu": 2**21, "cuda": 2**27}


def tiles(rows: int, columns: int, device: torch.device) -> Iterator[slice]:
    """Yield slices that cover ``rows`` rows of ``columns`` float32 values each, in order."""
    budget = TILE_BYTES.get(device.type, TILE_BYTES["cuda"])
    step = max(budget // (4 * columns), 1)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
