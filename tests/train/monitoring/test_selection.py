"""Which iteration to ship, from records made by hand; recorded ones are in test_recorded_runs.py."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinov2.errors import ConfigError
from dinov2.train.monitoring.records import Record
from dinov2.train.monitoring.selection import Selection, describe

KNN = "knn_balanced_accuracy"
NAN = math.nan


def labelled(*values: float, half: float = 0.04, every: int = 100, collapsed: tuple[int, ...] = ()):
    """Records with a k-NN score each, its interval to both sides; ``collapsed`` are positions."""
    return [
        Record(
            every * place,
            {KNN: value, "rankme": 10.0 + place},
            {KNN: (value - half, value + half)},
            ("all is one",) if place in collapsed else (),
        )
        for place, value in enumerate(values)
    ]


def unlabelled(*values: float, collapsed: tuple[int, ...] = ()):
    return [
        Record(100 * place, {"rankme": value}, {}, ("all is one",) if place in collapsed else ())
        for place, value in enumerate(values)
    ]


@pytest.mark.parametrize(
    ("values", "best"),
    [
        ([0.80], 0),
        ([0.80, 0.81], 0),  # within the margin of 0.02
        ([0.80, 0.83], 1),
        ([0.80, 0.83, 0.84], 1),  # the earliest of those that cannot be told apart
        ([0.80, 0.83, 0.86, 0.70], 2),  # it decays
        ([0.80, 0.70, 0.60], 0),
        ([0.80, NAN, 0.83], 2),
        ([NAN, 0.70, 0.80], 2),  # the first that is defined is the baseline
    ],
)
def test_a_record_takes_over_if_it_is_higher_by_more_than_the_margin(values, best):
    assert Selection().judge(labelled(*values)).best.iteration == 100 * best


def test_a_collapsed_record_is_never_chosen():
    records = labelled(0.80, 0.95, 0.85, collapsed=(1,))
    choice = Selection().judge(records)
    assert choice.best.iteration == 200
    assert "collapsed in 1 of 3 evaluations, first at iteration 100: all is one" in describe(choice, records)


def test_nothing_beats_the_start():
    records = labelled(0.80, 0.81, 0.71)
    choice = Selection().judge(records)
    text = describe(choice, records)
    assert text.startswith(
        "Ship the starting backbone (iteration 0): no later evaluation has a k-NN balanced"
    )
    assert "0.8000 (95 % interval 0.7600..0.8400)" in text
    assert "0.81 at iteration 100, is not above it by the 0.02 that would tell them apart" in text
    assert "at iteration 200, it is 0.7100 (95 % interval 0.6700..0.7500), -9.0 points" in text


def test_the_paragraph_names_the_start_and_the_loss_of_going_on():
    records = labelled(0.80, 0.90, 0.85)
    text = describe(Selection().judge(records), records)
    assert text.startswith(
        "Ship iteration 100: its k-NN balanced accuracy is higher than that of the starting"
    )
    assert "The starting backbone has 0.8000" in text
    assert "-5.0 points" in text
    assert "report scores on others" in text


@pytest.mark.parametrize(
    ("values", "collapsed", "stop"),
    [
        ([0.8, 0.9, 0.9, 0.9], (), False),
        ([0.8, 0.9, 0.9, 0.9, 0.9], (), True),
        ([0.8, 0.9, 0.9, NAN, 0.9], (), False),  # not told, so not counted
        ([0.8, 0.9, 0.9, 0.9, 0.95], (), False),
        ([0.8, 0.9, 0.9, 0.99, 0.9], (3,), True),
    ],
)
def test_patience_counts_evaluations_without_a_gain(values, collapsed, stop):
    assert Selection(patience=3).judge(labelled(*values, collapsed=collapsed)).stop is stop


def test_rankme_is_smoothed_over_two_records():
    choose = Selection().judge
    assert choose(unlabelled(100, 100, 108)).best.iteration == 0  # the mean of the last two is 104
    assert choose(unlabelled(100, 108, 108)).best.iteration == 200
    assert choose(unlabelled(100, 500, 500, collapsed=(1,))).best.iteration == 200
    assert choose(unlabelled(100, 50, 150)).best.iteration == 0


def test_rankme_says_what_it_cannot_tell():
    records = unlabelled(100, 200, 300)
    choice = Selection().judge(records)
    assert choice.signal == "rankme"
    assert "does not tell features that are right for a task" in describe(choice, records)


def test_auto_goes_by_labels_where_there_are_any():
    assert Selection().judge(labelled(0.8, 0.9)).signal == KNN
    assert Selection("rankme").judge(labelled(0.8, 0.9)).signal == "rankme"
    assert Selection("knn_auroc").signal == "knn_auroc"


def test_without_any_score_the_newest_sound_record_is_named():
    records = labelled(0.8, 0.9, 0.9, collapsed=(2,))
    choice = Selection("knn_auroc").judge(records)
    assert (choice.best.iteration, choice.signal, choice.stop) == (100, "", False)
    assert "no evaluation has a k-NN AUROC" in describe(choice, records)


def test_where_all_collapsed_the_start_is_named_and_the_text_says_so():
    records = labelled(0.8, 0.9, collapsed=(0, 1))
    choice = Selection().judge(records)
    assert choice.best.iteration == 0
    assert "in every evaluation that could be compared the features were collapsed" in describe(
        choice, records
    )


def test_a_resumed_run_decides_the_same_and_repeated_iterations_count_once():
    records = labelled(0.8, 0.7, 0.9, 0.95)
    repeated = [records[0], records[1], records[2], *labelled(0.8, 0.7, 0.6)[1:]]
    assert Selection().judge(repeated) == Selection().judge(labelled(0.8, 0.7, 0.6))


@pytest.mark.parametrize("patience", [0, -1])
def test_patience_is_at_least_one(patience):
    with pytest.raises(ConfigError, match=f"evaluation.patience is {patience}"):
        Selection(patience=patience)


def test_no_records_at_all():
    with pytest.raises(ValueError, match="no records"):
        Selection().judge([])


scores = st.one_of(st.just(NAN), st.floats(0.0, 1.0))
runs = st.lists(
    st.tuples(scores, st.floats(0.0, 0.2), st.floats(0.0, 0.2), st.booleans()), min_size=1, max_size=12
)


@given(runs, st.integers(1, 4))
def test_the_choice_is_within_the_interval_of_the_best_in_hindsight(run, patience):
    records = [
        Record(place, {KNN: value}, {KNN: (value - below, value + above)}, ("x",) if collapsed else ())
        for place, (value, below, above, collapsed) in enumerate(run)
    ]
    selection = Selection(patience=patience)
    choice = selection.judge(records)
    assert choice == selection.judge(records)  # pure
    assert describe(choice, records)
    sound = [record for record in records if not record.collapse and math.isfinite(record.signals[KNN])]
    if not sound:
        return
    assert choice.best in sound
    for other in sound:
        assert choice.best.signals[KNN] >= other.intervals[KNN][0]
    # Only what has just been evaluated takes over: the networks of anything else are gone.
    for count in range(1, len(records)):
        before, now = (selection.judge(records[:end]).best.iteration for end in (count, count + 1))
        assert now in (before, count) or not any(r in sound for r in records[:count])
