"""Which iteration of a run to ship, decided by its records alone.

The rule is sequential, because only the networks that have just been evaluated can still be exported. In the
order of the iterations a record takes the place of the best one if its score is higher by more than a margin:

- a signal with a bootstrap interval: half the distance from the score to the lower end of its 95 % interval,
  about one standard error. What is shipped is then never below the interval of any later or earlier record,
  and of records that cannot be told apart the earliest is taken, which has drifted least.
- a signal without one (RankMe): the score is smoothed, the mean of the record and the one before it, and the
  margin is 5 % of the best score.

Records of collapsed features, and those whose score is not defined, are never chosen. Iteration 0, the
starting backbone, takes part as any other: where nothing beats it, it is what the run advises to ship.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dinov2.errors import ConfigError
from dinov2.train.monitoring.records import Record

LABELLED = "knn_balanced_accuracy"  # what "auto" means where there are labels
UNLABELLED = "rankme"

# One standard error is about half of what the 95 % interval reaches below the score.
INTERVAL_SHARE = 0.5
RELATIVE_MARGIN = 0.05
SMOOTHED_RECORDS = 2


@dataclass(frozen=True)
class Choice:
    """What a run would ship if it ended now.

    Attributes:
        best: the chosen record.
        stop: no evaluation of the last ``patience`` ones has become the best.
        why: one sentence.
        signal: by which it was chosen; empty where no record has a score, and ``best`` is the newest.
        value: the score that was compared, smoothed where the signal has no interval; NaN without a signal.
        without_gain: evaluations since the best one whose score is defined, or whose features collapsed.
    """

    best: Record
    stop: bool
    why: str
    signal: str
    value: float
    without_gain: int


@dataclass(frozen=True)
class _Scored:
    record: Record
    value: float
    margin: float  # by which the value must lie above that of the best so far, where it is absolute


class Selection:
    """The rule with its settings.

    Args:
        signal: name of a signal of which more is better, or ``auto``: ``knn_balanced_accuracy`` if any record
            has it, else ``rankme``.
        patience: evaluations without a gain after which ``stop`` is set, at least 1.

    Raises:
        ConfigError: the patience is below 1.
    """

    def __init__(self, signal: str = "auto", patience: int = 5) -> None:
        if patience < 1:
            raise ConfigError(f"evaluation.patience is {patience}: it counts evaluations, from 1 on")
        self.signal, self.patience = signal, patience

    def judge(self, records: Sequence[Record]) -> Choice:
        """Choose among the records of a run so far; equal records give an equal choice.

        Args:
            records: at least one. Of records of the same iteration the last one counts.

        Raises:
            ValueError: there are no records.
        """
        if not records:
            raise ValueError("there are no records to choose from")
        ordered = in_order(records)
        signal = self.resolve(ordered)
        scored = [item for item in _scores(ordered, signal) if math.isfinite(item.value)]
        usable = [item for item in scored if not item.record.collapse]
        if not usable:
            return _no_choice(ordered, signal, any_score=bool(scored))
        best = usable[0]
        for item in usable[1:]:
            if item.value > best.value + _margin(item, best):
                best = item
        without_gain = sum(
            1
            for record in ordered
            if record.iteration > best.record.iteration
            and (record.collapse or math.isfinite(record.signals.get(signal, math.nan)))
        )
        return Choice(
            best.record,
            stop=without_gain >= self.patience,
            why=_reason(best, usable, signal, without_gain),
            signal=signal,
            value=best.value,
            without_gain=without_gain,
        )

    def resolve(self, records: Sequence[Record]) -> str:
        """Return the name of the signal that these records are compared by."""
        if self.signal != "auto":
            return self.signal
        has_labels = any(LABELLED in record.signals for record in records)
        return LABELLED if has_labels else UNLABELLED


def in_order(records: Sequence[Record]) -> list[Record]:
    """Return one record per iteration, the last of equals, in the order of the iterations."""
    by_iteration = {record.iteration: record for record in records}
    return [by_iteration[iteration] for iteration in sorted(by_iteration)]


def describe(choice: Choice, records: Sequence[Record]) -> str:
    """Return the paragraph that a run ends with: what to ship, why, and what going on has cost.

    Args:
        choice: of :meth:`Selection.judge`.
        records: that it was made from.
    """
    ordered = in_order(records)
    best, last = choice.best, ordered[-1]
    sentences = [f"Ship {name_of(best)}: {choice.why}."]
    if choice.signal:
        at_best = score_in_words(best, choice.signal)
        sentences.append(f"Its {in_words(choice.signal)} is {at_best}.")
        start = ordered[0]
        if start.iteration == 0 and best.iteration:
            sentences.append(f"The starting backbone has {score_in_words(start, choice.signal)}.")
        if last.iteration != best.iteration:
            sentences.append(_loss_of_going_on(best, last, choice.signal))
        if not _has_interval(best, choice.signal):
            sentences.append(
                f"{in_words(choice.signal)} is a number without labels: it tells a collapse, and does not "
                "tell features that are right for a task from others. With evaluation.train_dataset_path and "
                "val_dataset_path the choice would be by k-NN."
            )
        elif choice.signal.startswith("knn_"):
            sentences.append(
                "The labelled images have taken part in this choice: report scores on others that have not."
            )
        elif choice.signal.startswith("slide_"):
            sentences.append(
                "The patients have taken part in this choice: report scores on others that have not."
            )
    collapsed = [record for record in ordered if record.collapse]
    if collapsed:
        sentences.append(
            f"The features were collapsed in {len(collapsed)} of {len(ordered)} evaluations, first at "
            f"iteration {collapsed[0].iteration}: {'; '.join(collapsed[0].collapse)}."
        )
    return " ".join(sentences)


def name_of(record: Record) -> str:
    """Return ``iteration 400`` or ``the starting backbone (iteration 0)``."""
    return f"iteration {record.iteration}" if record.iteration else "the starting backbone (iteration 0)"


def score_in_words(record: Record, signal: str) -> str:
    """Return ``0.8123 (95 % interval 0.7711..0.8502)``, without the interval where there is none."""
    value = record.signals.get(signal, math.nan)
    if not _has_interval(record, signal):
        return f"{value:.4g}"
    low, high = record.intervals[signal]
    return f"{value:.4f} (95 % interval {low:.4f}..{high:.4f})"


def in_words(signal: str) -> str:
    """Return what a signal is called in a sentence."""
    names = {
        "rankme": "RankMe",
        "knn_balanced_accuracy": "k-NN balanced accuracy",
        "knn_accuracy": "k-NN accuracy",
        "knn_macro_f1": "k-NN macro F1",
        "knn_auroc": "k-NN AUROC",
        "slide_auroc": "slide AUROC",
    }
    return names.get(signal, signal.replace("_", " "))


def _has_interval(record: Record, signal: str) -> bool:
    return all(math.isfinite(end) for end in record.intervals.get(signal, (math.nan,)))


def _scores(records: Sequence[Record], signal: str) -> list[_Scored]:
    """Return what is compared; records that have no score are given NaN."""
    scored, before = [], []
    for record in records:
        value = record.signals.get(signal, math.nan)
        if _has_interval(record, signal):
            low = record.intervals[signal][0]
            scored.append(_Scored(record, value, INTERVAL_SHARE * max(value - low, 0.0)))
            continue
        if record.collapse or not math.isfinite(value):
            scored.append(_Scored(record, value, math.nan))
            continue
        before = [*before, value][-SMOOTHED_RECORDS:]
        scored.append(_Scored(record, sum(before) / len(before), math.nan))
    return scored


def _margin(item: _Scored, best: _Scored) -> float:
    return item.margin if math.isfinite(item.margin) else RELATIVE_MARGIN * abs(best.value)


def _reason(best: _Scored, usable: Sequence[_Scored], signal: str, without_gain: int) -> str:
    name = in_words(signal)
    first = usable[0]
    if len(usable) == 1:
        # Of the start nobody can say more: that of a training from scratch looks as if it had collapsed.
        sound = ", and not collapsed" if first.record.iteration else ""
        return f"it is the only evaluation with a {name}{sound}"
    highest = max(usable, key=lambda item: item.value)
    if best is first:
        told = f"no later evaluation has a {name} that is higher by more than its margin"
    else:
        told = f"its {name} is higher than that of {name_of(first.record)} by more than its margin"
    if highest.value > best.value:
        told += (
            f"; the highest, {highest.value:.4g} at {name_of(highest.record)}, is not above it by the "
            f"{_margin(highest, best):.2g} that would tell them apart"
        )
    elif without_gain:
        told += ", and it is the highest of the run"
    return told


def _no_choice(ordered: Sequence[Record], signal: str, *, any_score: bool) -> Choice:
    sound = [record for record in ordered if not record.collapse]
    if any_score or not sound:
        why = "in every evaluation that could be compared the features were collapsed: nothing was gained"
        return Choice(ordered[0], False, why, signal if any_score else "", math.nan, len(ordered) - 1)
    why = f"no evaluation has a {in_words(signal)} to choose by, and this is the newest that is not collapsed"
    return Choice(sound[-1], False, why, "", math.nan, 0)


def _loss_of_going_on(best: Record, last: Record, signal: str) -> str:
    value, end = best.signals.get(signal, math.nan), last.signals.get(signal, math.nan)
    where = f"the last evaluation, at iteration {last.iteration}"
    if not math.isfinite(end):
        return f"In {where}, it is not defined."
    change = end - value
    if _has_interval(best, signal):
        return f"In {where}, it is {score_in_words(last, signal)}, {100 * change:+.1f} points."
    return f"In {where}, it is {end:.4g}, {change:+.3g}."
