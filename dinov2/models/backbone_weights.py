"""The weights of one backbone, opened but not read: the entry chosen, prefixes off, names converted."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinov2.models.architecture import USUAL_HEADS, Architecture
from dinov2.models.companions import Companion, Constants, published_like, read_companion
from dinov2.models.conversion import State, is_square, layout_of, refuse_rotary_positions, to_flat_names
from dinov2.models.entries import choose_network, leaves
from dinov2.models.sources import locate
from dinov2.models.stored import stored_content
from dinov2.models.weight_files import OpenedFile, open_file


@dataclass(frozen=True)
class BackboneWeights:
    """The weights of one backbone, opened but not read.

    Attributes:
        source: What was asked for, for messages.
        path: The file; None for a dictionary.
        kind: Kind of file in words.
        layout: Whose parameter names the file has, in words.
        tensors: All tensors of the file.
        plain: Those of the backbone by the names they have there, without wrapper prefixes.
        state: The same under flat DINOv2 names.
        unused: Entries of the file that are no part of this backbone -> what they are.
        companion: What the files beside it say.
        metadata: What the file says about itself.
    """

    source: str
    path: Path | None
    kind: str
    layout: str
    tensors: State
    plain: State
    state: State
    unused: dict[str, str]
    companion: Companion
    metadata: Mapping[str, str]

    @property
    def architecture(self) -> Architecture:
        """The model that the weights belong to."""
        return Architecture.of(
            self.state, num_heads=self.companion.num_heads, norm_eps=self.companion.layer_norm_eps
        )

    @property
    def patches(self) -> int | None:
        """Patches that the position embeddings are laid out for; None without positions."""
        positions = self.state.get("pos_embed")
        return positions.shape[1] - 1 if positions is not None and positions.ndim == 3 else None

    @property
    def grid(self) -> int | None:
        """Rows, and columns, of the square grid of these patches; None if they form no square."""
        return math.isqrt(self.patches) if is_square(self.patches or 0) else None

    @property
    def usual_heads(self) -> int | None:
        """Attention heads that models of this width have; None for a width that none has."""
        return USUAL_HEADS.get(self.architecture.width)

    @property
    def looks_like(self) -> str:
        """The name of the published model with these sizes, an empty string if there is none."""
        published = published_like(self.architecture, self.patches or 0)
        return published.name if published else ""

    @property
    def normalisation(self) -> Constants | None:
        """Channel means and standard deviations of the images it was trained with, where they are known."""
        published = published_like(self.architecture, self.patches or 0)
        return self.companion.normalisation or (published.normalisation if published else None)

    @property
    def normalisation_origin(self) -> str:
        """How they are known: ``stated`` beside the weights, guessed from the ``sizes``, or not at all."""
        if self.companion.normalisation:
            return "stated"
        return "sizes" if self.normalisation else ""


def open_weights(source: str | Mapping[str, Any] | OpenedFile, entry: str | None = None) -> BackboneWeights:
    """Find and open backbone weights; nothing but names, shapes and types is read.

    Args:
        source: A source as :func:`dinov2.models.sources.locate` takes it, a file that is open already, or a
            dictionary as a file holds it.
        entry: Which network of a checkpoint to take, ``teacher`` or ``student``; by default the teacher if
            there is one. A file with bare weights has nothing to choose from and ignores it.

    Raises:
        WeightsError: The file is missing, unreadable or unsafe, has no such entry, or is no backbone that
            could be converted.
    """
    path, kind, metadata, companion = None, "dictionary", {}, Companion()
    if isinstance(source, Mapping):
        name, content = "the given dictionary", stored_content(source)
    else:
        opened = source if isinstance(source, OpenedFile) else open_file(locate(str(source), entry=entry))
        path = opened.path
        name = str(path) if isinstance(source, OpenedFile) else str(source)
        content, kind, metadata = opened.content, opened.kind, opened.metadata
        companion = read_companion(path)
    network = choose_network(content, entry, name)
    refuse_rotary_positions(network.state, name)
    return BackboneWeights(
        source=name,
        path=path,
        kind=kind,
        layout=layout_of(network.state),
        tensors=dict(leaves(content)),
        plain=network.state,
        state=to_flat_names(network.state),
        unused=network.unused,
        companion=companion,
        metadata=metadata,
    )
