"""The image-level and the patch-level term of the objective, as sums over the rows of a head.

Shapes: B images per rank, L local crops per image, M masked patches, D width, K prototypes; rows of crops are
crop-major, see :mod:`dinov2.train.ssl_meta_arch`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dinov2.loss.prototypes import Term, prototype_cross_entropy
from dinov2.loss.targets import Targets

NUM_GLOBAL_CROPS = 2


@dataclass(frozen=True)
class Entry:
    """One logged entry: ``weights`` times the cross-entropies of V views of c rows, summed.

    Attributes:
        name: DINOv2's.
        tokens: [V * c, D] student tokens, view after view.
        weights: [c] float32, of each row and the same for all views.
        targets: of c rows each, one for every teacher view.
        loss_weight: how often the entry counts in the total.
    """

    name: str
    tokens: Tensor
    weights: Tensor
    targets: Sequence[Targets]
    loss_weight: float

    @property
    def views(self) -> int:
        return len(self.tokens) // max(len(self.weights), 1)


def dino_entries(
    global_cls: Tensor, local_cls: Tensor | None, targets: Targets, loss_weight: float
) -> list[Entry]:
    """Return the entries of the image-level term: every view predicts the teacher's other views.

    A global crop has one target, a local crop two, and all pairs count alike. Cross-entropy is linear in the
    target, so the two of a local crop are added up.

    Args:
        global_cls: [2B, D] cls tokens.
        local_cls: [L*B, D] cls tokens, or None.
        targets: of 2B rows, row i made from the other view of the image in row i of ``global_cls``.
        loss_weight: of the term.
    """
    images = len(global_cls) // NUM_GLOBAL_CROPS
    local_views = 0 if local_cls is None else len(local_cls) // images
    pairs = max(NUM_GLOBAL_CROPS * local_views, 1) + NUM_GLOBAL_CROPS
    weights = torch.full((NUM_GLOBAL_CROPS * images,), 1.0 / (images * pairs), device=global_cls.device)
    entries = [Entry("dino_global_crops_loss", global_cls, weights, [targets], loss_weight)]
    if local_cls is not None:
        both = [targets.part(slice(images)), targets.part(slice(images, None))]
        entries.append(Entry("dino_local_crops_loss", local_cls, weights[:images], both, loss_weight))
    return entries


def head_loss(
    head: Callable[..., tuple[Tensor, Tensor]],
    entries: Sequence[Entry],
    student_temp: float,
    *,
    compile: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Run a student head on the tokens of all its entries at once.

    Args:
        head: called as ``head(tokens, then)``, see :class:`dinov2.layers.DINOHead`.
        entries: of this head, at least one.
        student_temp: student temperature, > 0.
        compile: run the losses through torch.compile.

    Returns:
        What the entries add to the total, with its graph, and their values by name, without.
    """
    terms, start = [], 0
    for entry in entries:
        weights = entry.loss_weight * entry.weights
        terms.append(Term(start, entry.views, weights, entry.targets))
        start += len(entry.tokens)
    then = partial(prototype_cross_entropy, terms=terms, temperature=student_temp, compile=compile)
    total, rows = head(torch.cat([entry.tokens for entry in entries]), then)
    values = rows.split([len(entry.tokens) for entry in entries])
    return total, {
        entry.name: torch.dot(part, entry.weights.repeat(entry.views))
        for entry, part in zip(entries, values, strict=True)
    }
