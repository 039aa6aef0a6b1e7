"""What follows from evaluations in whole runs: ``best/``, an early end, a collapse."""

import json
import shutil
from dataclasses import replace

import pytest

from dinov2.errors import CollapsedError, ConfigError
from dinov2.train.monitoring.monitor import Monitor
from dinov2.train.monitoring.records import RECORDS_FILE, read_records
from tests.checkpoints import read_state
from tests.train.conftest import TinyRun

OPTIONS = ("evaluation.monitor_period=2", "train.self_check=off", "checkpointing.period=2")
FILES = {
    "best.json",
    *(f"{network}_checkpoint.pth" for network in ("teacher", "student")),
    *(f"{network}_dino_head_checkpoint.pth" for network in ("teacher", "student")),
}


@pytest.fixture
def scored(tiny, monkeypatch):
    """Start the tiny run with a RankMe of one's own after each number of iterations."""
    real = Monitor._compute

    def start(out, ranks, *overrides, options=()):
        def compute(self, done, temperature):
            record = real(self, done, temperature)
            return replace(record, signals={**record.signals, "rankme": ranks[done]})

        monkeypatch.setattr(Monitor, "_compute", compute)
        tiny.start(out, *OPTIONS, *overrides, options=options)
        return (out / "logs" / "log.txt").read_text()

    return start


def held(out):
    return json.loads((out / "best" / "best.json").read_text())


def test_the_best_iteration_is_kept_and_named_at_the_end(scored, tmp_path):
    ranks = {0: 4.0, 2: 9.0, 4: 9.1, 6: 5.0}
    log = scored(tmp_path, ranks, "evaluation.eval_period_iterations=2")
    # Smoothed: 4, 6.5, 9.05, 7.05.
    assert held(tmp_path)["iteration"] == 4 and held(tmp_path)["signal"] == "rankme"
    assert {path.name for path in (tmp_path / "best").iterdir()} - {"loss_centers.pth"} >= FILES
    exported = tmp_path / "eval" / "training_3" / "teacher_checkpoint.pth"
    assert (tmp_path / "best" / "teacher_checkpoint.pth").read_bytes() == exported.read_bytes()
    assert "Ship iteration 4: its RankMe is higher than that of the starting backbone" in log


def test_where_nothing_beats_the_start_it_is_what_to_ship(scored, tmp_path):
    log = scored(tmp_path, {0: 9.0, 2: 8.0, 4: 7.0, 6: 6.0})
    assert held(tmp_path)["iteration"] == 0
    assert "Ship the starting backbone (iteration 0)" in log


def test_a_run_without_gain_ends_early_and_a_restart_takes_no_step(scored, tmp_path):
    ranks = {0: 9.0, 2: 8.0, 4: 7.0, 6: 6.0}
    stops = ("evaluation.early_stop=true", "evaluation.patience=1", "evaluation.best_checkpoint=rankme")
    log = scored(tmp_path, ranks, *stops)
    assert "the run ends after iteration 1: 1 evaluation brought nothing better" in log
    assert [record.iteration for record in read_records(tmp_path / RECORDS_FILE)] == [0, 2]
    assert read_state(tmp_path / "model_final")["iteration"] == 1
    log = scored(tmp_path, ranks, *stops)
    assert "no step is taken after iteration 1: 1 evaluation brought" in log


def go_back_to_iteration_4(out):
    shutil.rmtree(out / "model_final")
    (out / "last_checkpoint.rank_0").unlink()


def test_a_run_that_is_to_stop_when_it_comes_back_leaves_what_an_end_leaves(scored, tmp_path):
    ranks = {0: 9.0, 2: 8.0, 4: 7.0, 6: 6.0}
    scored(tmp_path, ranks)
    go_back_to_iteration_4(tmp_path)
    log = scored(tmp_path, ranks, "evaluation.early_stop=true", "evaluation.patience=1")
    assert "no step is taken after iteration 3: 2 evaluations brought nothing better" in log
    assert read_state(tmp_path / "model_final")["iteration"] == 3
    assert log.count("Ship the starting backbone") == 2
    assert [record.iteration for record in read_records(tmp_path / RECORDS_FILE)] == [0, 2, 4]


def test_a_choice_that_could_not_be_written_is_made_good_where_its_networks_are_loaded(scored, tmp_path):
    ranks = {0: 9.0, 2: 9.0, 4: 20.0, 6: 1.0}
    scored(tmp_path, ranks)
    expected = (tmp_path / "best" / "teacher_checkpoint.pth").read_bytes()
    go_back_to_iteration_4(tmp_path)
    (tmp_path / "best").unlink()
    shutil.rmtree(tmp_path / "best_iterations")
    scored(tmp_path, ranks)
    assert held(tmp_path)["iteration"] == 4
    assert (tmp_path / "best" / "teacher_checkpoint.pth").read_bytes() == expected


def test_evaluations_of_other_images_are_not_compared(scored, tmp_path):
    scored(tmp_path, {0: 99.0, 2: 98.0, 4: 97.0, 6: 96.0})
    go_back_to_iteration_4(tmp_path)
    log = scored(tmp_path, {4: 9.0, 6: 9.5}, "evaluation.monitor_samples=20")
    assert "3 of 3 evaluations of this run were of other images" in log
    assert not any(record.collapse for record in read_records(tmp_path / RECORDS_FILE))
    assert held(tmp_path)["iteration"] == 4


@pytest.mark.parametrize("reaction", ["warn", "stop"])
def test_collapsed_features_are_called_so_and_never_shipped(scored, tmp_path, reaction):
    ranks = {0: 100.0, 2: 1.0, 4: 500.0, 6: 1.0}
    if reaction == "stop":
        for _ in range(2):  # the same command again takes no further step, and fails, too
            with pytest.raises(CollapsedError, match="ended early: the features have collapsed.*lower optim"):
                scored(tmp_path, ranks, "evaluation.on_collapse=stop")
        log = (tmp_path / "logs" / "log.txt").read_text()
        assert (tmp_path / "model_final").exists()
        rows = [json.loads(row) for row in (tmp_path / "training_metrics.json").read_text().splitlines()]
        assert [row["iteration"] for row in rows] == [0, 1]  # the last row does not wait for log_period
    else:
        log = scored(tmp_path, ranks)
    assert "the features have COLLAPSED after 2 iterations: RankMe, the number of directions in use" in log
    records = read_records(tmp_path / RECORDS_FILE)
    assert [record.iteration for record in records] == ([0, 2, 4, 6] if reaction == "warn" else [0, 2])
    assert bool(records[1].collapse) and not records[0].collapse
    assert held(tmp_path)["iteration"] == (4 if reaction == "warn" else 0)


def test_nothing_is_kept_where_nothing_is_chosen(scored, tmp_path):
    log = scored(tmp_path, {0: 1.0, 2: 2.0, 4: 3.0, 6: 4.0}, "evaluation.best_checkpoint=none")
    assert not (tmp_path / "best").exists() and "Ship" not in log


def test_a_new_run_sets_the_choice_of_the_old_one_aside(scored, tmp_path):
    scored(tmp_path, {0: 1.0, 2: 2.0, 4: 3.0, 6: 9.0})
    scored(tmp_path, {0: 9.0, 2: 2.0, 4: 3.0, 6: 1.0}, options=("--no-resume",))
    assert held(tmp_path / "before_1")["iteration"] == 6 and held(tmp_path)["iteration"] == 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluation.best_checkpoint=knn_auroc"], "needs labelled images: name them with"),
        (["evaluation.best_checkpoint=none", "evaluation.early_stop=true"], "nothing tells when to stop"),
        (["evaluation.monitor_period=0", "evaluation.early_stop=true"], "nothing is evaluated in the loop"),
        (["evaluation.best_checkpoint=knn_auroq"], "evaluation.best_checkpoint"),
    ],
)
def test_settings_that_contradict_each_other(tiny: TinyRun, overrides, message):
    with pytest.raises(ConfigError, match=message):
        tiny.resolve(*overrides)
