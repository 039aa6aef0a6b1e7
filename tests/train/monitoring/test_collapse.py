"""Each reason alone, its limit, and its comparison with the start; real runs are in test_recorded_runs.py."""

import math

import pytest

from dinov2.train.monitoring.collapse import find_collapse, find_dead_assignments, worse_than_start
from dinov2.train.monitoring.records import Record

WIDTH, PROTOTYPES = 384, 65_536
HEALTHY = {
    "feature_std": 0.04,
    "rankme": 210.0,
    "teacher_prototype_entropy": 5.0,
    "teacher_prototype_usage_entropy": 6.0,
}


def reasons(*, start: dict | None = HEALTHY, iteration: int = 100, **changed: float):
    record = Record(iteration, {**HEALTHY, **changed})
    first = None if start is None else Record(0, start)
    return find_collapse(record, first, prototypes=PROTOTYPES, embed_dim=WIDTH)


def test_healthy_features_have_no_reason():
    assert reasons() == () == reasons(start=None)


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        (
            {"feature_std": 0.002},
            "the feature std is 0.002, 3.9 % of the 0.051 of an even spread (at the start 0.04)",
        ),
        ({"rankme": 3.0}, "RankMe, the number of directions in use, is 3 (at the start 210)"),
        (
            {"teacher_prototype_usage_entropy": 0.01},
            "nearly all images have the same prototype: the usage entropy is 0.01 of 11.09 (at the start 6)",
        ),
        (
            {"teacher_prototype_entropy": 11.08, "teacher_prototype_usage_entropy": 11.085},
            "the teacher assigns every image to all prototypes alike: the entropy is 11.08 of 11.09 "
            "(at the start 5)",
        ),
        (
            {"teacher_prototype_entropy": 5.99},
            "the teacher assigns all images alike: the entropy of the mean assignment is 6, and that of a "
            "single one 5.99, 0.01 less (at the start 1)",
        ),
    ],
)
def test_one_reason_with_both_values(changed, text):
    assert reasons(**changed) == (text,)


@pytest.mark.parametrize(("score", "called"), [(0.5, True), (0.6, True), (0.61, False)])
def test_what_prototypes_say_does_not_count_where_labels_show_better_features(score, called):
    uniform = {"teacher_prototype_entropy": 11.08, "teacher_prototype_usage_entropy": 11.085}
    start = Record(0, {**HEALTHY, "knn_balanced_accuracy": 0.5}, {"knn_balanced_accuracy": (0.4, 0.6)})
    record = Record(100, {**HEALTHY, **uniform, "knn_balanced_accuracy": score})
    found = find_collapse(record, start, prototypes=PROTOTYPES, embed_dim=WIDTH)
    assert bool(found) == called
    assert "to all prototypes alike" in find_dead_assignments(record, start, prototypes=PROTOTYPES)
    few = Record(100, {**record.signals, "rankme": 3.0})
    assert find_collapse(few, start, prototypes=PROTOTYPES, embed_dim=WIDTH)  # what features say does


def test_features_that_are_no_numbers():
    assert reasons(feature_std=math.nan) == ("the features are not finite numbers",)
    assert reasons(feature_std=math.nan, iteration=0) == ("the features are not finite numbers",)


FRESH = {
    "feature_std": 0.002,
    "rankme": 1.5,
    "teacher_prototype_entropy": 0.2,
    "teacher_prototype_usage_entropy": 0.3,
}


def test_a_network_from_scratch_begins_so_and_is_not_called_collapsed():
    assert reasons(start=FRESH, iteration=0, **FRESH) == ()
    assert reasons(start=FRESH, **FRESH) == ()
    # Without its start the same record is called collapsed.
    assert len(reasons(start=None, **FRESH)) == 3


def test_what_is_not_defined_is_no_reason():
    assert reasons(rankme=math.nan, teacher_prototype_entropy=math.nan) == ()
    assert find_collapse(Record(1, {"feature_std": 0.04}), None, prototypes=2, embed_dim=WIDTH) == ()


def scored(iteration: int, value: float):
    return Record(
        iteration, {"knn_balanced_accuracy": value}, {"knn_balanced_accuracy": (value - 0.06, value + 0.06)}
    )


def test_worse_than_at_the_start_is_another_thing():
    text = worse_than_start(scored(100, 0.41), scored(0, 0.80))
    assert text == (
        "the k-NN balanced accuracy is 0.4100, below the starting backbone's 0.8000 "
        "(95 % interval 0.7400..0.8600)"
    )
    assert worse_than_start(scored(100, 0.75), scored(0, 0.80)) == ""
    assert worse_than_start(scored(100, math.nan), scored(0, 0.80)) == ""
    assert worse_than_start(scored(100, 0.1), None) == ""
