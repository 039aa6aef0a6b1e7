"""Whole runs on real digits: a collapse is called within one period, and the choice is good in hindsight."""

import pytest

from scripts.choose_iteration import planned_runs, run_once

PERIOD, ITERATIONS = 25, 400
BROKEN = ("lr_x1000", "no_centering")


@pytest.mark.slow
@pytest.mark.parametrize("run", planned_runs([0, 1, 2], ITERATIONS), ids=lambda run: run.name)
def test_verdicts_of_whole_runs(run, tmp_path):
    _, outcome = run_once(tmp_path, run, PERIOD)
    if run.kind in BROKEN:
        assert outcome.collapsed[0] == PERIOD, outcome
        return
    assert outcome.collapsed == [] and outcome.worse == [], outcome
    assert outcome.chosen > 0 and outcome.within, outcome
    assert outcome.test_accuracy is not None
