"""Whole runs on real digits: a collapse is called within one period, and the choice is good in hindsight."""

import pytest

from scripts.choose_iteration import planned_runs, run_once

PERIOD = 50  # the recipe's own
SEEDS = [0, 1, 2]


@pytest.mark.slow
def test_a_run_without_centring_is_called_collapsed_at_the_first_evaluation(tmp_path):
    (run,) = planned_runs(["no_centering"], SEEDS, PERIOD)
    records, outcome = run_once(tmp_path, run, PERIOD)
    assert outcome.collapsed == [PERIOD], outcome
    # The verdict of the run itself, as it stands in its file.
    assert [bool(record.collapse) for record in records] == [False, True]
    assert outcome.chosen == 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_a_learning_rate_times_1000_is_called_collapsed_at_the_first_evaluation(seed, tmp_path):
    (run,) = planned_runs(["lr_x1000"], [seed], PERIOD)
    _, outcome = run_once(tmp_path, run, PERIOD)
    assert outcome.collapsed == [PERIOD], outcome
    assert outcome.worse == [PERIOD], outcome
    assert outcome.chosen == 0


@pytest.mark.slow
@pytest.mark.parametrize("run", planned_runs(["healthy"], SEEDS, 2 * PERIOD), ids=str)
def test_healthy_runs_are_not_called_collapsed(run, tmp_path):
    records, outcome = run_once(tmp_path, run, PERIOD)
    assert outcome.collapsed == [] and outcome.worse == [], outcome
    assert not any(record.collapse for record in records)
    assert outcome.chosen > 0 and outcome.within, outcome


@pytest.mark.slow
@pytest.mark.parametrize("run", planned_runs(["overtrained"], SEEDS, 480), ids=str)
def test_the_choice_is_within_the_interval_of_the_best_in_hindsight(run, tmp_path):
    _, outcome = run_once(tmp_path, run, 40)
    assert outcome.collapsed == [], outcome
    assert outcome.chosen > 0 and outcome.within, outcome
    assert outcome.test_accuracy is not None
