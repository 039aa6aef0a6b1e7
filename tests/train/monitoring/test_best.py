"""The folder ``best``: complete at any moment, and of the iteration that was chosen."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from dinov2.errors import OutputError
from dinov2.train.export import export_networks
from dinov2.train.monitoring import best
from dinov2.train.monitoring.best import best_iteration, update_best
from dinov2.train.monitoring.records import Record
from dinov2.train.monitoring.selection import Selection

KNN = "knn_balanced_accuracy"
FILES = {
    "teacher_checkpoint.pth",
    "student_checkpoint.pth",
    "teacher_dino_head_checkpoint.pth",
    "student_dino_head_checkpoint.pth",
    "best.json",
}


class Run:
    """Tiny networks whose only weight is the iteration, and the records of their run."""

    def __init__(self, output_dir: Path) -> None:
        self.output_dir, self.records = output_dir, []
        output_dir.mkdir(exist_ok=True)

    def evaluate(self, iteration: int, value: float, **options) -> bool:
        self.records.append(Record(iteration, {KNN: value}, {KNN: (value - 0.02, value + 0.02)}))
        self.weight = float(iteration) + value
        return update_best(self.output_dir, self.choice(), iteration, self.export, **options)

    def choice(self):
        return Selection().judge(self.records)

    def export(self, folder: Path) -> None:
        parts = {name: nn.Linear(1, 1, bias=False) for name in ("backbone", "dino_head")}
        for part in parts.values():
            nn.init.constant_(part.weight, self.weight)
        export_networks(nn.ModuleDict(parts), nn.ModuleDict(parts), folder)

    def held(self) -> tuple[int, float]:
        """(iteration of the summary, weight in the files), which must belong together."""
        folder = self.output_dir / "best"
        assert {path.name for path in folder.iterdir()} == FILES
        summary = json.loads((folder / "best.json").read_text())
        weights = {
            torch.load(path, weights_only=True)[entry][key].item()
            for entry, key in (("teacher", "backbone.weight"), ("student_dino_head", "weight"))
            for path in [folder / f"{entry}_checkpoint.pth"]
        }
        (weight,) = weights
        assert best_iteration(self.output_dir) == summary["iteration"]
        assert weight == pytest.approx(summary["iteration"] + summary["value"])
        return summary["iteration"], weight

    def folders(self) -> set[str]:
        return {path.name for path in (self.output_dir / "best_iterations").iterdir()}


@pytest.fixture
def run(tmp_path) -> Run:
    return Run(tmp_path / "run")


def test_it_holds_the_start_and_then_what_is_better(run):
    assert run.evaluate(0, 0.5)
    assert run.held()[0] == 0
    assert run.evaluate(10, 0.7)
    assert run.evaluate(20, 0.6)
    assert run.held()[0] == 10
    assert run.folders() == {"10"}


def test_the_summary_tells_value_interval_and_why_as_of_now(run):
    run.evaluate(0, 0.5)
    run.evaluate(10, 0.7)
    run.evaluate(20, 0.705)
    summary = json.loads((run.output_dir / "best" / "best.json").read_text())
    assert summary["signal"] == KNN and summary["value"] == 0.7
    assert summary["interval"] == [0.7 - 0.02, 0.7 + 0.02]
    assert summary["why"] == run.choice().why and "0.705 at iteration 20" in summary["why"]


class Killed(BaseException):
    pass


CALLS = ["rename", "replace", "symlink_to", "unlink", "mkdir"]


def test_a_kill_at_any_moment_leaves_the_old_or_the_new(run, monkeypatch):
    """The process dies before each single change of the file system, in turn; the next start goes on."""
    run.evaluate(0, 0.5)
    left = set()
    for moment in range(200):
        counter = iter(range(10_000))

        def dying(real, counter=counter, moment=moment):
            def call(*args, **kwargs):
                if next(counter) == moment:
                    raise Killed
                return real(*args, **kwargs)

            return call

        killed = Run(run.output_dir.with_name(f"killed_{moment}"))
        shutil.copytree(run.output_dir, killed.output_dir, symlinks=True, dirs_exist_ok=True)
        killed.records = run.records[:]
        with monkeypatch.context() as patch:
            for name in CALLS:
                patch.setattr(Path, name, dying(getattr(Path, name)))
            patch.setattr(best.shutil, "rmtree", dying(best.shutil.rmtree))
            try:
                killed.evaluate(10, 0.7)
            except Killed:
                pass
            else:
                break
        left.add(killed.held()[0])
        update_best(killed.output_dir, killed.choice(), 10, killed.export)
        assert killed.held()[0] == 10 and killed.folders() == {"10"}
    else:
        pytest.fail("the last moment was not reached")
    assert left == {0, 10} and moment > 10


def test_a_full_disk_keeps_the_old_choice_and_says_so(run, monkeypatch, caplog):
    run.evaluate(0, 0.5)
    real = run.export

    def full(folder):
        real(folder)
        (folder / "student_checkpoint.pth").unlink()
        raise OutputError("student_checkpoint.pth cannot be written (No space left on device)")

    monkeypatch.setattr(run, "export", full)
    assert not run.evaluate(10, 0.7)
    assert run.held()[0] == 0
    (message,) = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert "keeps the earlier choice" in message and "No space left" in message
    monkeypatch.undo()
    # The choice stays at 10, whose networks are gone: told at every evaluation, until another is chosen.
    assert not run.evaluate(20, 0.65)
    assert "should be of iteration 10, whose networks are not there" in caplog.text
    assert "of iteration 0, until" in caplog.text
    assert run.evaluate(30, 0.8)
    assert run.held()[0] == 30 and run.folders() == {"30"}


def test_a_run_that_goes_back_finds_its_earlier_choice(run):
    run.evaluate(0, 0.5)
    run.evaluate(10, 0.6, needed=run.records[:1])
    run.evaluate(20, 0.7, needed=run.records[1:2])  # the newest checkpoint is of iteration 10
    assert run.folders() == {"10", "20"}
    run.records = run.records[:2]
    assert update_best(run.output_dir, run.choice(), None, run.export)
    assert run.held()[0] == 10


def test_an_iteration_that_is_done_again_and_differs_replaces_the_first(run):
    run.evaluate(0, 0.5)
    run.evaluate(10, 0.7)
    run.records = run.records[:1]
    run.evaluate(10, 0.75)
    assert run.held() == (10, 10.75)
    assert run.folders() == {"10_2"}


def test_the_same_record_is_not_exported_twice(run, monkeypatch):
    run.evaluate(0, 0.5)
    run.evaluate(10, 0.7)
    run.records = run.records[:1]
    monkeypatch.setattr(run, "export", None)
    assert run.evaluate(10, 0.7)


def test_a_folder_of_somebody_else_is_left_alone(run, caplog):
    (run.output_dir / "best").mkdir()
    assert not run.evaluate(0, 0.5)
    assert "is no link that a training made" in caplog.text
    assert list((run.output_dir / "best").iterdir()) == []
