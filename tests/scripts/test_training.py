"""How the quickstart starts the trainer, and when it takes what is there."""

import subprocess
import sys
from pathlib import Path

import pytest

from dinov2.errors import ConfigError
from scripts.quickstart import training
from scripts.quickstart.__main__ import get_args_parser, main
from scripts.quickstart.training import REPO, TrainingFailedError, config_overrides, train


@pytest.fixture
def overrides(tiles, tmp_path):
    return config_overrides(tiles, tmp_path / "weights.pth", short=True, extra=[])


@pytest.fixture
def started(monkeypatch):
    """Stand in for the trainer: note the folder, leave the file that a finished training leaves."""
    folders = []

    def run(folder, overrides, *, processes):
        folders.append(folder)
        export = folder / "eval" / "training_5"
        export.mkdir(parents=True, exist_ok=True)
        (export / "teacher_checkpoint.pth").touch()

    monkeypatch.setattr(training, "run_trainer", run)
    return folders


def test_a_finished_training_is_taken_as_it_is(overrides, started, tmp_path):
    first = train(tmp_path, overrides, seed=0, processes=2)
    again = train(tmp_path, overrides, seed=0, processes=2)
    assert (first.reused, again.reused) == (False, True)
    assert first.teacher == again.teacher
    assert started == [first.folder]


def test_other_settings_and_seeds_get_folders_of_their_own(overrides, started, tmp_path):
    for extra, seed, processes in (([], 0, 2), (["optim.base_lr=0.001"], 0, 2), ([], 1, 2), ([], 0, 1)):
        train(tmp_path, [*overrides, *extra], seed=seed, processes=processes)
    assert len(set(started)) == 4


def test_fresh_trains_again(overrides, started, tmp_path):
    done = train(tmp_path, overrides, seed=0, processes=2)
    (done.folder / "old").touch()
    train(tmp_path, overrides, seed=0, processes=2, fresh=True)
    assert len(started) == 2
    assert not (done.folder / "old").exists()


def test_an_unfinished_training_is_started_again_in_its_folder(overrides, started, tmp_path):
    done = train(tmp_path, overrides, seed=0, processes=2)
    (done.folder / training.FINISHED).unlink()
    train(tmp_path, overrides, seed=0, processes=2)
    assert started == [done.folder, done.folder]


def test_a_wrong_override_stops_before_the_trainer(overrides, started, tmp_path):
    with pytest.raises(ConfigError, match="base_lr"):
        train(tmp_path, [*overrides, "optim.base_lrr=1"], seed=0, processes=2)
    assert not started


def test_the_trainer_is_started_by_torchrun(overrides, tmp_path, monkeypatch):
    seen = {}

    def run(command, *, env, **_):
        seen.update(command=command, threads=env["OMP_NUM_THREADS"])
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(training, "available_cores", lambda: 8)
    monkeypatch.setattr(training.subprocess, "run", run)
    with pytest.raises(TrainingFailedError, match="exit status 3"):
        training.run_trainer(tmp_path, overrides, processes=2)
    torchrun, *options = seen["command"]
    assert Path(torchrun).is_file()
    assert options[:3] == ["--standalone", "--nproc-per-node=2", "dinov2/train/train.py"]
    assert options[-len(overrides) :] == overrides
    assert seen["threads"] == "4"


@pytest.mark.parametrize("option", ["--seeds", "--processes"])
def test_a_wrong_count_is_refused(option, tmp_path):
    args = get_args_parser().parse_args([option, "0", "--output-dir", str(tmp_path)])
    with pytest.raises(ConfigError, match=f"{option} 0 is not a positive number"):
        main(args)


@pytest.mark.slow
def test_short_run_from_end_to_end(tmp_path):
    command = [sys.executable, "-m", "scripts.quickstart", "--short", "--output-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "after - before" in done.stdout
    assert {"report.html", "scores.json", "crops.png"} <= {path.name for path in tmp_path.iterdir()}
    again = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert "finished earlier" in again.stdout
