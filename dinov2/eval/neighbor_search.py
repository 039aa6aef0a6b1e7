"""Exact search for the nearest stored features.

Shapes: Q queries, S stored (training) rows, D width. Similarity is the dot product in float32; neighbours are
ordered by similarity, descending, then by row, ascending.

On a CPU most of the time is the matrix product. Of many stored rows, for many queries, groups of similar ones
are formed: by the Cauchy-Schwarz inequality no row of a group of centre c is more similar to a query q than
q c + |q| r, r the largest distance of a row from c. Groups in which no neighbour can be are left out, which
changes nothing in the result, and much of the work where features form clusters.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate

import torch
from torch import Tensor

# One block of similarities is at most 512 x 131072 float32: 256 MiB, whatever the data set. Wide ones, as the
# best of each block have to be found and merged.
QUERY_BLOCK = 512
STORED_BLOCK = 131_072
# Columns of which the maximum alone is looked at first. Sorting groups out pays if at most one in so many
# is left.
GROUP = 16
WORTHWHILE = 2
# Groups pay from so many stored rows and queries on, and as long as less than this share of the rows is
# looked at.
MANY_ROWS = 16_384
MANY_QUERIES = 1024
NUM_GROUPS = 64
WORTHWHILE_SHARE = 0.5
# Of |q| |x|: more than the rounding errors of two dot products in float32.
SLACK = 1e-4

Found = tuple[Tensor, Tensor]  # similarities and rows, (Q, k) each


def find_neighbors(stored: Tensor, queries: Tensor, k: int) -> Found:
    """Return the similarities and the rows of the ``k`` nearest stored features of every query.

    Args:
        stored: Features (S, D).
        queries: Features (Q, D) on the same device.
        k: At most S.

    Returns:
        Similarities (Q, k) float32 and rows (Q, k) int64, nearest first.
    """
    stored, queries = stored.float(), queries.float()
    # One piece of memory for all blocks: to have the system hand out new pages each time costs a quarter.
    space = queries.new_empty(min(QUERY_BLOCK, len(queries)) * min(STORED_BLOCK, len(stored)))
    # Not on a GPU, where the host would have to wait for every bound.
    many = stored.device.type == "cpu" and len(stored) >= MANY_ROWS and len(queries) >= MANY_QUERIES
    with torch.no_grad(), _exact_matmul(stored.device):
        if many:
            return _Groups(stored).find(queries, k, space)
        blocks = [_find_in_blocks(stored, block, k, space) for block in queries.split(QUERY_BLOCK)]
    return tuple(torch.cat(parts) for parts in zip(*blocks, strict=True))


class _Groups:
    """Stored features (S, D) in groups round the centres of a round of k-means."""

    def __init__(self, stored: Tensor) -> None:
        centres = stored[torch.linspace(0, len(stored) - 1, NUM_GROUPS).long()]
        nearest, _ = _nearest(stored, centres)
        counts = nearest.bincount(minlength=len(centres))
        sums = torch.zeros_like(centres).index_add_(0, nearest, stored)
        self.centres = (sums / counts[:, None])[counts > 0]
        nearest, scores = _nearest(stored, self.centres)
        counts = nearest.bincount(minlength=len(self.centres))
        self.sizes = counts.tolist()
        self.stored, self.rows = stored, nearest.argsort(stable=True).split(self.sizes)
        squares = stored.square().sum(dim=1)
        self.largest = squares.max().sqrt()
        # |x - c|^2 = |x|^2 - 2 (x c - |c|^2 / 2), and what it is rounded by.
        distances = (squares - 2 * scores).clamp_(min=0).add_(SLACK**2 * self.largest**2).sqrt_()
        self.radii = torch.zeros(len(self.centres)).scatter_reduce(0, nearest, distances, "amax")
        self.asked = self.looked_at = 0

    def find(self, queries: Tensor, k: int, space: Tensor) -> Found:
        """Do as :func:`find_neighbors`; queries near the same centre need the same groups, so go together."""
        nearest, _ = _nearest(queries, self.centres)
        sizes = [size for size in nearest.bincount().tolist() if size]
        similarities = queries.new_empty(len(queries), k)
        rows = torch.empty(len(queries), k, dtype=torch.int64)
        for alike in nearest.argsort(stable=True).split(sizes):
            for block in alike.split(QUERY_BLOCK):
                similarities[block], rows[block] = self._find_alike(queries[block], k, space)
        return similarities, rows

    def _find_alike(self, queries: Tensor, k: int, space: Tensor) -> Found:
        enough_left_out = self.looked_at <= WORTHWHILE_SHARE * self.asked * len(self.stored)
        if self.asked >= MANY_QUERIES // 2 and not enough_left_out:
            return _find_in_blocks(self.stored, queries, k, space)
        self.asked += len(queries)
        products = queries @ self.centres.T
        by_nearness = products.mean(dim=0).argsort(descending=True).tolist()
        enough = next(i for i, rows in enumerate(accumulate(self.sizes[g] for g in by_nearness)) if rows >= k)
        near = by_nearness[: enough + 1]
        best = self._find_in(near, queries, k, space)
        # An equal value of a smaller row counts, too.
        floor = best[0][:, -1:].nextafter(torch.tensor(-torch.inf))
        reach = queries.norm(dim=1, keepdim=True) * (self.radii + SLACK * self.largest)
        possible = (products + reach >= floor).any(dim=0)
        possible[near] = False
        others = possible.nonzero()[:, 0].tolist()
        if not any(self.sizes[group] for group in others):
            return best
        return merge_unordered([best, self._find_in(others, queries, k, space, floor)], k)

    def _find_in(
        self, groups: Sequence[int], queries: Tensor, k: int, space: Tensor, floor: Tensor | None = None
    ) -> Found:
        rows = torch.cat([self.rows[group] for group in groups]).sort().values
        similarities, places = _find_in_blocks(self.stored[rows], queries, k, space, floor)
        self.looked_at += len(queries) * len(rows)
        return similarities, rows[places]


def _nearest(features: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nearest centre c of each feature x, by the Euclidean distance, and x c - |c|^2 / 2."""
    offsets = centres.square().sum(dim=1) / 2
    found = [(part @ centres.T).sub_(offsets).max(dim=1) for part in features.split(STORED_BLOCK)]
    return torch.cat([part.indices for part in found]), torch.cat([part.values for part in found])


def _find_in_blocks(
    stored: Tensor, queries: Tensor, k: int, space: Tensor, least: Tensor | None = None
) -> Found:
    """Find neighbours (Q, at most k); of those at or below ``least`` (Q, 1) some may be left out."""
    best = None
    # Blocks of equal size: the first one, of which nothing can be left out, is no larger than it has to be.
    size = math.ceil(len(stored) / max(1, math.ceil(len(stored) / STORED_BLOCK)))
    for start in range(0, len(stored), max(1, size)):
        floor = least if best is None or best[0].shape[1] < k else best[0][:, -1:]
        block = stored[start : start + size]
        products = space[: len(queries) * len(block)].view(len(queries), len(block))
        similarities, rows = _top_of_groups(torch.mm(queries, block.T, out=products), k, floor)
        found = (similarities, rows + start)
        best = found if best is None else merge_neighbors([best, found], k)
    return best


def merge_neighbors(parts: Sequence[Found], k: int) -> Found:
    """Merge neighbours found in consecutive ranges of rows, given in the order of their rows."""
    similarities = torch.cat([part[0] for part in parts], dim=1)
    rows = torch.cat([part[1] for part in parts], dim=1)
    # Equal similarities stand in the order of their rows already, and a stable sort keeps it.
    similarities, order = similarities.sort(dim=1, descending=True, stable=True)
    return similarities[:, :k], rows.gather(1, order[:, :k])


def merge_unordered(parts: Sequence[Found], k: int) -> Found:
    """Merge neighbours found in sets of rows that may lie between each other."""
    rows, order = torch.cat([part[1] for part in parts], dim=1).sort(dim=1)
    similarities = torch.cat([part[0] for part in parts], dim=1).gather(1, order)
    return merge_neighbors([(similarities, rows)], k)


def _top_of_groups(similarities: Tensor, k: int, floor: Tensor | None) -> Found:
    """Do as :func:`_top`, but look only into the groups of columns whose maximum is high enough.

    Args:
        floor: (Q, 1), values above which alone are of interest; None if all are. Others may be left out.
    """
    num_groups = similarities.shape[1] // GROUP
    # Group g has the columns g, g + num_groups, ...: maxima of whole stretches of memory are fast.
    grouped = similarities[:, : GROUP * num_groups].unflatten(1, (GROUP, num_groups))
    peaks = grouped.amax(dim=1) if num_groups else similarities[:, :0]
    # The k largest values lie in the k groups of the largest maxima, or in as many as exceed the floor.
    wanted = k if floor is None else int((peaks > floor).sum(dim=1).max())
    if wanted >= num_groups or wanted * GROUP * WORTHWHILE > similarities.shape[1]:
        return _top(similarities, k)
    peaks, groups = peaks.topk(wanted + 1, dim=1)
    groups = groups[:, :wanted].sort(dim=1).values  # columns have to stay in their order
    chosen = grouped.gather(2, groups[:, None, :].expand(-1, GROUP, -1)).flatten(1)
    first = num_groups * torch.arange(GROUP, device=groups.device)
    columns = (first[:, None] + groups[:, None, :]).flatten(1)
    rest = torch.arange(GROUP * num_groups, similarities.shape[1], device=groups.device)
    columns = torch.cat([columns, rest.expand(len(columns), -1)], dim=1)
    values, places = _top(torch.cat([chosen, similarities[:, GROUP * num_groups :]], dim=1), k)
    columns = columns.gather(1, places)
    if floor is None:  # a tie at the cut may go either way
        tied = (peaks[:, -1] == peaks[:, -2]).nonzero()[:, 0]
        if len(tied):
            values[tied], columns[tied] = _top(similarities[tied], k)
    return values, columns


def _top(similarities: Tensor, k: int) -> Found:
    """Return the ``k`` largest values per row and their columns, equal values by ascending column."""
    k = min(k, similarities.shape[1])
    # `topk` is fast but takes any of several equal values: columns are put in order afterwards, and the
    # rows where equal values lie on both sides of the cut, seen from one value more, are sorted completely.
    values, columns = similarities.topk(min(k + 1, similarities.shape[1]), dim=1)
    cut = (values[:, k - 1 : k] == values[:, k:]).nonzero()[:, 0]
    columns = columns[:, :k].sort(dim=1).values
    if len(cut):
        columns[cut] = similarities[cut].argsort(dim=1, descending=True, stable=True)[:, :k]
    values, order = similarities.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return values, columns.gather(1, order)


@contextmanager
def _exact_matmul(device: torch.device) -> Iterator[None]:
    """Multiply in float32, without autocast and TF32: three decimal digits would reorder neighbours."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
