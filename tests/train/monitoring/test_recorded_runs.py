"""The verdicts over records of real runs on scikit-learn's digits, kept in recorded_runs.json.

A ViT of two blocks from scratch, batches of 24, 128 prototypes; 512 pictures for the signals without labels,
k-NN from 300 labelled pictures on 250 others. "lr_x1000" has 1,000 times the learning rate, "no_centering" a
centre that stays zero; the healthy runs balance by Sinkhorn-Knopp or, one of them, by a running centre.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dinov2.train.monitoring.collapse import find_collapse, worse_than_start
from dinov2.train.monitoring.records import Record
from dinov2.train.monitoring.selection import Selection, describe

KNN = "knn_balanced_accuracy"
RECORDED = json.loads(Path(__file__).with_name("recorded_runs.json").read_text("utf-8"))
BROKEN = {"lr_x1000", "no_centering"}
HEALTHY = sorted(set(RECORDED) - BROKEN)


def records_of(name: str) -> list[Record]:
    rows = [
        Record(row["iteration"], row["signals"], {key: tuple(ends) for key, ends in row["intervals"].items()})
        for row in RECORDED[name]
    ]
    return [replace(row, collapse=find_collapse(row, rows[0], prototypes=128, embed_dim=96)) for row in rows]


@pytest.mark.parametrize("name", sorted(BROKEN))
def test_a_broken_run_is_called_collapsed_at_its_first_evaluation_and_at_all_later_ones(name):
    records = records_of(name)
    assert not records[0].collapse
    assert all(record.collapse for record in records[1:])
    choice = Selection(patience=2).judge(records)
    assert choice.best.iteration == 0 and choice.stop
    assert describe(choice, records).startswith("Ship the starting backbone (iteration 0)")


def test_what_is_said_of_the_broken_runs():
    first = {name: " | ".join(records_of(name)[1].collapse) for name in BROKEN}
    assert "nearly all images have the same prototype" in first["no_centering"]
    assert "feature std is 0.003" in first["lr_x1000"]
    # KoLeo goes on to spread the features: without the prototypes the missing centre would not be seen.
    assert "feature" not in first["no_centering"]


def test_the_high_learning_rate_also_made_the_features_worse():
    records = records_of("lr_x1000")
    assert "below the starting backbone's" in worse_than_start(records[1], records[0])


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_run_is_never_called_collapsed_or_worse(name):
    records = records_of(name)
    assert len(records) >= 3
    assert [record.collapse for record in records] == [()] * len(records)
    assert [worse_than_start(record, records[0]) for record in records] == [""] * len(records)


@pytest.mark.parametrize("name", HEALTHY)
def test_the_choice_lies_within_the_interval_of_the_best_in_hindsight(name):
    records = records_of(name)
    best = max(records, key=lambda record: record.signals[KNN])
    chosen = Selection().judge(records).best
    low, high = best.intervals[KNN]
    assert low <= chosen.signals[KNN] <= high
