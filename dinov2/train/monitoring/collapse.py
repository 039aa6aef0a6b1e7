"""Have the features of a run collapsed, or become worse than those it began with? Told by records alone.

A network that trains from scratch begins with features that look collapsed: nearly all point the same way and
few prototypes are in use. So what a record says is compared with the start of the run, and a value counts as
collapsed only where it is bad in itself and also worse than at the start. What the prototypes say does not
count where labels show that the features have become better. The limits stand with their names;
docs/evaluation.md shows the runs that they come from.
"""

import math
from collections.abc import Mapping

from dinov2.train.monitoring.records import Record
from dinov2.train.monitoring.selection import LABELLED, in_words

# Share of the 1 / sqrt(D) of features spread evenly over the sphere.
LEAST_STD_SHARE = 0.05
# Directions in use: RankMe is 1 where all features are equal, or multiples of each other.
LEAST_RANK = 2.0
# Share of the start's RankMe.
LEAST_RANK_SHARE = 0.2
# Shares of ln K, K prototypes.
LEAST_USAGE_SHARE = 0.05
MOST_ENTROPY_SHARE = 0.99
# Nats by which the entropy of the mean assignment exceeds the mean entropy: what the prototype tells of the
# image, 0 where all images are assigned alike.
LEAST_INFORMATION = 0.02
# How far a value must have gone from that of the start, as a share of it.
WORSE = 0.5


def find_collapse(
    record: Record, start: Record | None, *, prototypes: int, embed_dim: int
) -> tuple[str, ...]:
    """Return one clause per reason to call the features collapsed, none if they are not.

    Args:
        record: what to judge.
        start: of the starting backbone, or None where it was not evaluated: then only what is bad in itself
            counts. Of the start itself only features that are no numbers count.
        prototypes: K of the DINO head.
        embed_dim: D of the backbone.
    """
    if not math.isfinite(record.signals.get("feature_std", math.nan)):
        return ("the features are not finite numbers",)
    if record.iteration == 0:
        return ()
    before = start.signals if start is not None else {}
    assignments = find_dead_assignments(record, start, prototypes=prototypes)
    found = (
        _equal_features(record, before, embed_dim),
        _few_directions(record, before),
        "" if better_than_start(record, start) else assignments,
    )
    return tuple(reason for reason in found if reason)


def find_dead_assignments(record: Record, start: Record | None, *, prototypes: int) -> str:
    """Return a clause where the DINO head does not tell images apart any more, else an empty text.

    The features need not be bad then: iBOT and KoLeo may go on to improve them.

    Args:
        record, start, prototypes: as for :func:`find_collapse`.
    """
    if record.iteration == 0:
        return ""
    before = start.signals if start is not None else {}
    return (
        _one_prototype(record, before, prototypes)
        or _uniform_assignments(record, before, prototypes)
        or _equal_assignments(record, before)
    )


def better_than_start(record: Record, start: Record | None, signal: str = LABELLED) -> bool:
    """Tell whether this score lies above the 95 % interval of what the run began with."""
    if start is None or record.iteration == start.iteration:
        return False
    return record.signals.get(signal, math.nan) > start.intervals.get(signal, (math.nan, math.nan))[1]


def worse_than_start(record: Record, start: Record | None, signal: str = LABELLED) -> str:
    """Return a clause where the features are worse than those that the run began with, else an empty text.

    They are where this score lies below the 95 % interval of the start's. A signal without intervals says
    nothing.
    """
    if start is None or record.iteration == start.iteration:
        return ""
    now, before = (each.signals.get(signal, math.nan) for each in (record, start))
    low, high = start.intervals.get(signal, (math.nan, math.nan))
    if not now < low:  # also where one of them is not defined
        return ""
    return (
        f"the {in_words(signal)} is {now:.4f}, below the starting backbone's {before:.4f} "
        f"(95 % interval {low:.4f}..{high:.4f})"
    )


def _equal_features(record: Record, before: Mapping[str, float], embed_dim: int) -> str:
    even = 1 / math.sqrt(embed_dim)
    value, earlier = record.signals["feature_std"], before.get("feature_std", math.nan)
    if value >= LEAST_STD_SHARE * even or value >= WORSE * earlier:
        return ""
    return (
        f"the feature std is {value:.2g}, {100 * value / even:.2g} % of the {even:.2g} of an even spread"
        f"{_from(earlier, '.2g')}"
    )


def _few_directions(record: Record, before: Mapping[str, float]) -> str:
    value, earlier = record.signals.get("rankme", math.nan), before.get("rankme", math.nan)
    if value < LEAST_RANK_SHARE * earlier or (value < LEAST_RANK and not value >= WORSE * earlier):
        return f"RankMe, the number of directions in use, is {value:.2g}{_from(earlier, '.3g')}"
    return ""


def _one_prototype(record: Record, before: Mapping[str, float], prototypes: int) -> str:
    name, most = "teacher_prototype_usage_entropy", math.log(prototypes)
    value, earlier = record.signals.get(name, math.nan), before.get(name, math.nan)
    if not value < LEAST_USAGE_SHARE * most or value >= WORSE * earlier:
        return ""
    return (
        f"nearly all images have the same prototype: the usage entropy is {value:.2g} of {most:.4g}"
        f"{_from(earlier, '.2g')}"
    )


def _uniform_assignments(record: Record, before: Mapping[str, float], prototypes: int) -> str:
    name, most = "teacher_prototype_entropy", math.log(prototypes)
    value, earlier = record.signals.get(name, math.nan), before.get(name, math.nan)
    # What is left to ln K is compared: at the start it may be little already.
    if not value > MOST_ENTROPY_SHARE * most or most - value >= WORSE * (most - earlier):
        return ""
    return (
        f"the teacher assigns every image to all prototypes alike: the entropy is {value:.4g} of {most:.4g}"
        f"{_from(earlier, '.4g')}"
    )


def _equal_assignments(record: Record, before: Mapping[str, float]) -> str:
    used, single = (f"teacher_prototype_{name}" for name in ("usage_entropy", "entropy"))
    values = {name: record.signals.get(name, math.nan) for name in (used, single)}
    value = values[used] - values[single]
    earlier = before.get(used, math.nan) - before.get(single, math.nan)
    if not value < LEAST_INFORMATION or value >= WORSE * earlier:
        return ""
    return (
        f"the teacher assigns all images alike: the entropy of the mean assignment is {values[used]:.4g}, "
        f"and that of a single one {values[single]:.4g}, {max(value, 0.0):.2g} less{_from(earlier, '.2g')}"
    )


def _from(earlier: float, form: str) -> str:
    return f" (at the start {earlier:{form}})" if math.isfinite(earlier) else ""
