"""Finds tiles of a slide that look the same, by a perceptual hash.

The hash keeps the signs of the lowest 64 frequencies of a grey 32 x 32 version of the tile against their
median (the discrete cosine transform of Zauner 2010, "Implementation and benchmarking of perceptual image
hash functions"). Tiles that differ in few bits show the same structure, whatever their brightness.
"""

import numpy as np
from PIL import Image

BITS = 64
_SIDE = 32
_FREQUENCIES = 8


def _cosines() -> np.ndarray:
    """Rows 1 to 8 of the discrete cosine transform of 32 values; row 0 would be the mean."""
    frequency, position = np.arange(1, _FREQUENCIES + 1)[:, None], np.arange(_SIDE)[None]
    return np.cos(np.pi * frequency * (2 * position + 1) / (2 * _SIDE)).astype(np.float32)


_COSINES = _cosines()
_ONES_OF_16_BITS = (
    np.unpackbits(np.arange(2**16, dtype=">u2").view(np.uint8)).reshape(-1, 16).sum(1, np.uint8)
)


def perceptual_hash(tile: Image.Image) -> int:
    """Return the 64 bits that describe the structure of a tile."""
    grey = np.asarray(tile.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX), np.float32)
    waves = (_COSINES @ grey @ _COSINES.T).ravel()
    return int.from_bytes(np.packbits(waves > np.median(waves)).tobytes(), "big")


def find_near_duplicates(hashes: np.ndarray, threshold: int) -> np.ndarray:
    """Say which tile repeats an earlier one.

    Tiles are taken in order; one is dropped if a kept tile before it differs in at most ``threshold`` bits.
    No two kept tiles are that close. Two hashes that differ in t bits agree in one of t + 1 parts, so only
    tiles that share a part are compared.

    Args:
        hashes: (n,) uint64.
        threshold: bits, 0 to 63.

    Returns:
        (n,) int64: the number of the kept tile that a tile repeats, -1 for tiles to keep.
    """
    unique, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    order = np.argsort(first)  # distinct hashes in order of their first tile
    repeats = np.full(len(unique), -1, np.int64)
    for earlier, later in _close_pairs(unique[order], threshold):
        if repeats[later] < 0 and repeats[earlier] < 0:
            repeats[later] = earlier
    first = first[order]
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    distinct = rank[inverse.ravel()]  # tile -> its hash
    kept = np.where(repeats >= 0, first[repeats], first)[distinct]
    return np.where(kept == np.arange(len(hashes)), -1, kept)


def _close_pairs(hashes: np.ndarray, threshold: int) -> np.ndarray:
    """Return the pairs (i, j), i < j, of close hashes, sorted by j and then i."""
    found = [np.empty((0, 2), np.int64)]
    edges = np.linspace(0, BITS, threshold + 2).astype(int)
    for start, end in zip(edges[:-1], edges[1:], strict=True):
        part = (hashes >> np.uint64(start)) & np.uint64((1 << int(end - start)) - 1)
        order = np.argsort(part, kind="stable")  # within a part, earlier tiles come first
        part, sorted_hashes = part[order], hashes[order]
        for step in range(1, len(order)):
            same = np.flatnonzero(part[step:] == part[:-step])
            if not len(same):
                break
            close = same[_distance(sorted_hashes[same], sorted_hashes[same + step]) <= threshold]
            found.append(np.stack([order[close], order[close + step]], axis=1))
    pairs = np.unique(np.concatenate(found), axis=0)
    return pairs[np.lexsort((pairs[:, 0], pairs[:, 1]))]


def _distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return _ONES_OF_16_BITS[np.ascontiguousarray(a ^ b).view(np.uint16).reshape(-1, 4)].sum(axis=1)
