"""Which sequences of packed batches go through a residual branch, and how they get there and back.

Stochastic depth leaves whole sequences out (Oquab et al. 2023, DINOv2, section 5). What a model leaves out in
all of its branches is drawn at once: one by one, the small operations of drawing would be most of what a GPU
is asked to start. Tokens are moved by gathers alone, in both passes.

Shapes: b sequences of n tokens in a batch, s of them kept, T tokens packed, S of them kept, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from dinov2.compiled import left_to_autograd
from dinov2.layers.packing import PackedLayout


@dataclass(frozen=True)
class Subset:
    """The sequences of every packed batch that go through a branch.

    Attributes:
        layout: of the kept sequences.
        rows: packed positions ``[S]`` of the kept tokens.
        place: where each of the T tokens is among the kept ones ``[T]``, anywhere if it is not.
        weights: how much the branch counts at each token, float32 ``[T, 1]``: b / s, which keeps the
            expectation, and 0 where it is left out.
        kept: whether it is not left out, bool ``[T, 1]``.
    """

    layout: PackedLayout
    rows: Tensor
    place: Tensor
    weights: Tensor
    kept: Tensor

    def take(self, x: Tensor) -> Tensor:
        """Return the kept tokens ``[1, S, D]`` of packed ``x``."""
        return move(x, self.rows, self.place, self.kept)

    def add(self, x: Tensor, parts: Tensor) -> Tensor:
        """Add parts ``[1, S, D]`` of the kept tokens to packed ``x``."""
        # ``index_add`` would keep the parts for its backward pass, though no gradient depends on them: 16 %
        # of what a block keeps in half precision.
        return torch.addcmul(x, move(parts, self.place, self.rows), self.weights).to(x.dtype)


def kept_sequences(batch: int, rate: float) -> int:
    """Return how many of ``batch`` sequences stochastic depth of a rate keeps: one at least."""
    return max(int(batch * (1 - rate)), 1)


def draw_subsets(layout: PackedLayout, rates: Sequence[float], device: torch.device) -> list[Subset]:
    """Draw one subset for each rate, independently.

    Args:
        layout: of the packed batches.
        rates: share of every batch to leave out, 0..1.
        device: where the tokens are; its generator is used.
    """
    if not rates:
        return []
    rows, places, weights = [], [], []
    for index, (batch, n) in enumerate(layout.shapes):
        counts, first_kept, scales = _kept(layout, tuple(rates), index, device)
        order = torch.rand(len(rates), batch, device=device).argsort(dim=1)
        rank = torch.empty_like(order)
        rank.scatter_(1, order, torch.arange(batch, device=device).expand_as(order))
        stays = rank < counts
        within = torch.arange(n, device=device)
        rows.append((order[..., None] * n + (within + layout.starts[index])).flatten(1))
        places.append((torch.where(stays, rank * n, 0)[..., None] + (within + first_kept)).flatten(1))
        weights.append(torch.where(stays, scales, 0.0)[..., None].expand(-1, -1, n).flatten(1))
    place, weight = torch.cat(places, dim=1), torch.cat(weights, dim=1)[..., None]
    kept = weight > 0
    subsets = []
    for number, rate in enumerate(rates):
        shapes = tuple((kept_sequences(batch, rate), n) for batch, n in layout.shapes)
        kept_rows = [part[number, : s * n] for part, (s, n) in zip(rows, shapes, strict=True)]
        moves = torch.cat(kept_rows), place[number], weight[number], kept[number]
        subsets.append(Subset(PackedLayout(shapes), *moves))
    return subsets


@lru_cache(maxsize=64)
def _kept(
    layout: PackedLayout, rates: tuple[float, ...], index: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Return, for each rate, what a batch keeps, on the device: copying it there again would wait for it.

    Returns:
        ``[rates, 1]`` number of sequences, ``[rates, 1, 1]`` tokens that earlier batches keep, and
        ``[rates, 1]`` float32 factor of what is kept.
    """
    batch = layout.shapes[index][0]
    counts = torch.tensor([kept_sequences(batch, rate) for rate in rates], device=device)
    before = [sum(kept_sequences(b, rate) * n for b, n in layout.shapes[:index]) for rate in rates]
    scales = [batch / kept_sequences(batch, rate) for rate in rates]
    return (
        counts[:, None],
        torch.tensor(before, device=device)[:, None, None],
        torch.tensor(scales, dtype=torch.float32, device=device)[:, None],
    )


class _Move(torch.autograd.Function):
    """Tokens at ``rows``; those of the gradient at ``back``, and none where ``moved`` is false.

    What autograd does by itself for a gather is to add up at every row, which is slow on a GPU and not
    reproducible; but no token here goes to two places.
    """

    @staticmethod
    def forward(x: Tensor, rows: Tensor, back: Tensor, moved: Tensor | None) -> Tensor:
        return x.index_select(1, rows)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, _, back, moved = inputs
        ctx.save_for_backward(back, moved)

    @staticmethod
    def backward(ctx, grad):
        back, moved = ctx.saved_tensors
        moved_back = grad.index_select(1, back)
        return moved_back if moved is None else torch.where(moved, moved_back, 0.0), None, None, None


@left_to_autograd
def move(x: Tensor, rows: Tensor, back: Tensor, moved: Tensor | None = None) -> Tensor:
    """Gather tokens of ``x [1, A, D]``, and their gradients the other way.

    Args:
        x: packed tokens.
        rows: ``[B]`` positions in ``x``.
        back: ``[A]`` where in the result each token of ``x`` is, once; anywhere if it is not there.
        moved: bool ``[A, 1]``, whether it is; by default all are.

    Returns:
        ``[1, B, D]``. Where the result holds tokens that ``back`` does not name, their gradients must be 0.
    """
    return _Move.apply(x, rows, back, moved)
