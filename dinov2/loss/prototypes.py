"""Prototype scores and their cross-entropy in one: neither scores nor gradients of all rows exist at once.

The last layer of a head turns n rows of a few hundred features into K scores each, 65,536 in DINOv2's
recipes, and the loss reduces them to a number a row. Done as separate layers, that writes and reads tens of
gigabytes a step. Here a block of rows is scored by one matrix product, made into its own gradient tile by
tile, and multiplied back; what is kept are the gradients of the rows and of the prototypes.

Shapes: n student rows, d features, K prototypes; a term has V views of c rows that share targets.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dinov2.compiled import compiled
from dinov2.layers.autocast import autocast_dtype
from dinov2.layers.prototype_scores import prototype_scores
from dinov2.loss.targets import Targets, added
from dinov2.loss.tiles import tiles

# Bytes of the scores of one block of rows: large enough for matrix products to run at full speed.
BLOCK_BYTES = 2**28


@dataclass(frozen=True)
class Term:
    """Student rows that predict the same targets in several views, and how much they count.

    Attributes:
        start: first of the V * c consecutive student rows, view after view.
        views: V.
        weights: [c] float32, of each row in the total, the same for all views.
        targets: of c rows each, one for every teacher view; they add up.
    """

    start: int
    views: int
    weights: Tensor
    targets: Sequence[Targets]

    @property
    def count(self) -> int:
        return len(self.weights)


def prototype_cross_entropy(
    features: Tensor,
    prototypes: Tensor,
    terms: Sequence[Term],
    temperature: float,
    *,
    compile: bool = False,
) -> tuple[Tensor, Tensor]:
    """Score ``features`` against ``prototypes`` and return the weighted sum of their cross-entropies.

    The products run in the format of autocast where that is on; everything else is float32. The gradient is
    computed in the forward pass, so the graph holds [n, d] and [K, d] numbers.

    Args:
        features: [n, d], every row in exactly one term.
        prototypes: [K, d].
        terms: what the rows are to predict.
        temperature: student temperature, > 0.
        compile: run what is no matrix product through torch.compile.

    Returns:
        The sum over all rows of weight * -sum_k target_k log softmax_k(features @ prototypes.T / temperature)
        (float32, to backpropagate once), and the [n] cross-entropies without weights or graph.
    """
    dtype = autocast_dtype(features.device) or features.dtype
    with torch.autocast(features.device.type, enabled=False):
        return _CrossEntropy.apply(features, prototypes, tuple(terms), temperature, dtype, compile)


@dataclass(frozen=True)
class _Piece:
    """A part of a term that fits in a block."""

    term: Term
    rows: slice  # of the c rows

    @property
    def size(self) -> int:
        return self.term.views * (self.rows.stop - self.rows.start)

    def student_rows(self) -> Iterator[slice]:
        for view in range(self.term.views):
            first = self.term.start + view * self.term.count
            yield slice(first + self.rows.start, first + self.rows.stop)

    def targets(self) -> list[Targets]:
        return [part.part(self.rows) for part in self.term.targets]

    def weights(self) -> Tensor:
        return self.term.weights[self.rows].repeat(self.term.views)


def _blocks(terms: Sequence[Term], most_rows: int) -> Iterator[list[_Piece]]:
    """Divide the rows of all terms into blocks of at most ``most_rows``, or one row of every view."""
    block: list[_Piece] = []
    room = most_rows
    for term in terms:
        done = 0
        while done < term.count:
            fitting = room // term.views
            if not fitting and block:
                yield block
                block, room = [], most_rows
                continue
            stop = min(done + max(fitting, 1), term.count)
            block.append(_Piece(term, slice(done, stop)))
            room -= block[-1].size
            done = stop
    if block:
        yield block


def _spans(block: Sequence[_Piece]) -> list[slice]:
    """Return the student rows of a block in its order, those that adjoin together."""
    spans: list[slice] = []
    for rows in (rows for piece in block for rows in piece.student_rows()):
        if spans and spans[-1].stop == rows.start:
            spans[-1] = slice(spans[-1].start, rows.stop)
        else:
            spans.append(rows)
    return spans


def _gather(tensor: Tensor, spans: Sequence[slice]) -> Tensor:
    return tensor[spans[0]] if len(spans) == 1 else torch.cat([tensor[span] for span in spans])


def _scatter(tensor: Tensor, spans: Sequence[slice], values: Tensor) -> None:
    for span, part in zip(spans, values.split([span.stop - span.start for span in spans]), strict=True):
        tensor[span] = part


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, prototypes, terms, temperature, dtype, compile):
        wants_features, wants_prototypes = ctx.needs_input_grad[:2]
        matrix = prototypes.to(dtype)
        losses = torch.zeros(len(features), device=features.device)
        total = torch.zeros((), device=features.device)
        grad_features = torch.zeros_like(features, dtype=torch.float32) if wants_features else None
        grad_prototypes = None
        # Rows are weighted relative to the largest weight: float16 has no room for small gradients.
        unit = _largest_weight(terms, total)
        most_rows = max(BLOCK_BYTES // (len(matrix) * matrix.element_size()), 1)
        for block in _blocks(terms, most_rows):
            spans = _spans(block)
            inputs = _gather(features, spans)
            scores = prototype_scores((inputs / temperature).to(dtype), matrix)
            parts = scores.split([piece.size for piece in block])
            consume = _consume_compiled if compile else _consume
            found = torch.cat([consume(piece, part) for piece, part in zip(block, parts, strict=True)])
            weights = torch.cat([piece.weights() for piece in block])
            _scatter(losses, spans, found)
            total += torch.dot(found, weights)
            share = (weights / -unit)[:, None]
            if wants_features:
                _scatter(grad_features, spans, (scores @ matrix).float() * share)
            if wants_prototypes:
                part = scores.T @ (inputs * share).to(dtype)
                grad_prototypes = part.float() if grad_prototypes is None else grad_prototypes.add_(part)
            del scores, parts
        if wants_prototypes and grad_prototypes is None:
            grad_prototypes = torch.zeros_like(prototypes, dtype=torch.float32)
        ctx.save_for_backward(grad_features, grad_prototypes)
        ctx.unit = unit / temperature
        ctx.dtypes = (features.dtype, prototypes.dtype)
        ctx.mark_non_differentiable(losses)
        return total, losses

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total, _):
        # In place, so autograd refuses a second backward pass.
        factor = grad_total * ctx.unit
        scaled = (
            None if gradient is None else gradient.mul_(factor).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *scaled, None, None, None, None


def _largest_weight(terms: Sequence[Term], like: Tensor) -> Tensor:
    largest = [term.weights.max() for term in terms if term.count]
    return torch.stack(largest).max().clamp_min(torch.finfo(torch.float32).tiny) if largest else like + 1.0


def _consume(piece: _Piece, scores: Tensor) -> Tensor:
    """Replace scores, divided by the temperature, by the negative gradient of their cross-entropy.

    Args:
        piece: of a term, V views of r rows.
        scores: [V * r, K], overwritten.

    Returns:
        [V * r] float32 cross-entropies.
    """
    views = scores.view(piece.term.views, -1, scores.shape[1])
    targets = piece.targets()
    negative = torch.empty(views.shape[:2], device=scores.device)
    for which in tiles(*views.shape[1:], scores.device):
        wanted = added(part.rows(which) for part in targets)
        for view, out in zip(views[:, which], negative[:, which], strict=True):
            log_probs = torch.log_softmax(view, dim=1, dtype=torch.float32)
            out.copy_(torch.bmm(wanted[:, None], log_probs[:, :, None]).flatten())
            torch.sub(wanted, log_probs.exp_(), alpha=len(targets), out=view)
    return negative.neg_().flatten()


def _consume_compiled(piece: _Piece, scores: Tensor) -> Tensor:
    """Do what :func:`_consume` does without tiles: a compiled kernel keeps a row's intermediate values."""
    views = scores.view(piece.term.views, -1, scores.shape[1])
    targets = piece.targets()
    factors = [torch.full((), 1.0 / part.temperature, device=scores.device) for part in targets]
    shifts = [part.bias for part in targets]
    return compiled(_replace)(views, [part.scores for part in targets], factors, shifts).flatten()


def _replace(
    views: Tensor, scores: Sequence[Tensor], factors: Sequence[Tensor], shifts: Sequence[Tensor]
) -> Tensor:
    wanted = added(
        torch.softmax(part.float() * factor + shift, dim=1)
        for part, factor, shift in zip(scores, factors, shifts, strict=True)
    )
    log_probs = torch.log_softmax(views.float(), dim=2)
    losses = -(wanted * log_probs).sum(dim=2)
    views.copy_(wanted - len(scores) * log_probs.exp())
    return losses
