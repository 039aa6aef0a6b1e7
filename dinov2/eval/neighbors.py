"""Exact nearest neighbours and their weighted vote: the mathematics of the k-NN evaluation.

Shapes: Q queries, S stored (training) rows, D width, C classes. Similarity is the dot product in float32;
neighbours are ordered by similarity, descending, then by row, ascending. Source: the weighted k-NN of Wu et
al. 2018, "Unsupervised feature learning via non-parametric instance discrimination", section 3.4.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional

from dinov2.errors import DatasetError

logger = logging.getLogger("dinov2")

# One block of similarities is at most 512 x 131072 float32: 256 MiB, whatever the data set. Wide ones, as the
# best of each block have to be found and merged.
QUERY_BLOCK = 512
STORED_BLOCK = 131_072
# Columns of which the maximum alone is looked at first. Sorting groups out pays if at most one in so many
# is left.
GROUP = 16
WORTHWHILE = 2


def find_neighbors(stored: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
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
    with torch.no_grad(), _exact_matmul(stored.device):
        blocks = [_find_in_blocks(stored, block, k, space) for block in queries.split(QUERY_BLOCK)]
    return tuple(torch.cat(parts) for parts in zip(*blocks, strict=True))


def _find_in_blocks(stored: Tensor, queries: Tensor, k: int, space: Tensor) -> tuple[Tensor, Tensor]:
    best = None
    # Blocks of equal size: the first one, of which nothing can be left out, is no larger than it has to be.
    size = math.ceil(len(stored) / max(1, math.ceil(len(stored) / STORED_BLOCK)))
    for start in range(0, len(stored), max(1, size)):
        floor = None if best is None or best[0].shape[1] < k else best[0][:, -1:]
        block = stored[start : start + size]
        products = space[: len(queries) * len(block)].view(len(queries), len(block))
        similarities, rows = _top_of_groups(torch.mm(queries, block.T, out=products), k, floor)
        found = (similarities, rows + start)
        best = found if best is None else merge_neighbors([best, found], k)
    return best


def merge_neighbors(parts: Sequence[tuple[Tensor, Tensor]], k: int) -> tuple[Tensor, Tensor]:
    """Merge neighbours found in consecutive ranges of rows, given in the order of their rows."""
    similarities = torch.cat([part[0] for part in parts], dim=1)
    rows = torch.cat([part[1] for part in parts], dim=1)
    # Equal similarities stand in the order of their rows already, and a stable sort keeps it.
    similarities, order = similarities.sort(dim=1, descending=True, stable=True)
    return similarities[:, :k], rows.gather(1, order[:, :k])


def _top_of_groups(similarities: Tensor, k: int, floor: Tensor | None) -> tuple[Tensor, Tensor]:
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


def _top(similarities: Tensor, k: int) -> tuple[Tensor, Tensor]:
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


def vote(
    similarities: Tensor, labels: Tensor, ks: Sequence[int], temperature: float, num_classes: int
) -> dict[int, Tensor]:
    """Return the class scores (Q, C) for every k.

    The weight of a neighbour is its softmax over all neighbours given, so the scores of a smaller k do not
    sum to one; which class wins is not affected.

    Args:
        similarities: (Q, K), nearest first, with K the largest k.
        labels: Labels of the neighbours (Q, K).
    """
    weights = functional.softmax(similarities / temperature, dim=1)
    zeros = weights.new_zeros(len(weights), num_classes)
    return {k: zeros.scatter_add(1, labels[:, :k], weights[:, :k]) for k in ks}


def usable_ks(ks: Sequence[int], num_stored: int) -> list[int]:
    """Return the distinct values of ``ks`` in ascending order, those above ``num_stored`` replaced by it."""
    too_large = sorted({k for k in ks if k > num_stored})
    if too_large:
        logger.warning(
            "k-NN with k = %s uses all %d training samples, there are no more",
            ", ".join(map(str, too_large)),
            num_stored,
        )
    return sorted({min(k, num_stored) for k in ks})


def count_classes(labels: Tensor) -> int:
    """Return the number of classes of training labels: the largest label plus one.

    Raises:
        DatasetError: There are no labels, or one is negative.
    """
    if not len(labels):
        raise DatasetError("the training dataset has no samples: evaluation needs labelled training images")
    if labels.min() < 0:
        raise DatasetError(
            f"the training labels contain {labels.min().item()}: labels must be class indices from 0, leave "
            "out the samples without a class"
        )
    return int(labels.max()) + 1


def knn_predict(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    k: int,
    temperature: float = 0.07,
    num_classes: int | None = None,
) -> Tensor:
    """Return the class scores of test features by the vote of their ``k`` nearest training features.

    Similarity is the cosine; nothing needs to be normalised before.

    Args:
        train_features: (S, D).
        train_labels: Class indices (S,).
        test_features: (Q, D).
        k: Number of neighbours; above S all of them vote, with a warning.
        temperature: Divides the similarity in the softmax of the weights.
        num_classes: C; None is the largest training label plus one.

    Returns:
        Scores (Q, C) float32, rows summing to one; ``argmax(dim=1)`` is the prediction.

    Raises:
        DatasetError: There are no training samples, or labels are negative.
    """
    num_classes = num_classes or count_classes(train_labels)
    (k,) = usable_ks([k], len(train_features))
    stored = functional.normalize(train_features.float(), dim=1)
    similarities, rows = find_neighbors(stored, functional.normalize(test_features.float(), dim=1), k)
    return vote(similarities, train_labels[rows], [k], temperature, num_classes)[k]
