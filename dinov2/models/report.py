"""What became of every tensor of a weight file and of the model that it was loaded into."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from dinov2.errors import some_of

NAMES_SHOWN = 3


def first_names(names: list[str]) -> str:
    """Return the first few names for a sentence."""
    return some_of(names, NAMES_SHOWN)


@dataclass(frozen=True)
class LoadReport:
    """The model's tensors are in ``loaded`` or ``missing``, those of the file in ``used`` or ``unused``.

    Attributes:
        source: What was asked for.
        path: The file that was read; empty for a dictionary.
        sha256: Its digest; empty for a dictionary and for a checkpoint of several files.
        layout: Whose names it has, in words.
        architecture: The model that the weights describe, in words.
        loaded: Parameters of the model taken from the file.
        converted: Those of them that were renamed or changed -> how.
        resampled: Those of them that were brought to another size -> how.
        missing: Parameters that the file lacks -> how they are initialised instead.
        used: Entries of the file -> the parameters of the model that they went into.
        unused: Entries of the file that are no part of a backbone -> what they are.
        share: Share of the model's parameters (numbers, not tensors) that came from the file, 0..1.
        normalisation: Channel means and standard deviations that the source was trained with.
        normalisation_origin: How these are known: ``stated`` beside the weights, or guessed by the ``sizes``
            of a published model.
        looks_like: Name of the published model with the same sizes, if there is one.
    """

    source: str
    loaded: list[str]
    path: str = ""
    sha256: str = ""
    layout: str = ""
    architecture: str = ""
    converted: dict[str, str] = field(default_factory=dict)
    resampled: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    used: dict[str, list[str]] = field(default_factory=dict)
    unused: dict[str, str] = field(default_factory=dict)
    share: float = 1.0
    normalisation: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    normalisation_origin: str = ""
    looks_like: str = ""

    def summary(self) -> str:
        """Return the report as one line."""
        total = len(self.loaded) + len(self.missing)
        layout = f" ({self.layout})" if self.layout else ""
        parts = [f"loaded {len(self.loaded)} of the model's {total} tensors from {self.source}{layout}"]
        parts += [f"{count} {how}" for how, count in Counter(self.converted.values()).items()]
        parts += [f"{name} resampled {how}" for name, how in self.resampled.items()]
        parts += [f"{name} not in the file: {how}" for name, how in self.missing.items()]
        kinds: dict[str, list[str]] = {}
        for name, kind in self.unused.items():
            kinds.setdefault(kind, []).append(name)
        parts += [f"unused {kind}: {first_names(names)}" for kind, names in kinds.items()]
        return "; ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """Return the whole report as plain values."""
        return asdict(self)
