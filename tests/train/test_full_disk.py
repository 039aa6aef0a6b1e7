"""A disk that is full for a while: the run goes on, and only its end needs to be written."""

import pytest

from dinov2.errors import OutputError
from dinov2.train import export
from dinov2.train.run_state import drop_rows_from

OPTIONS = ("train.self_check=off", "checkpointing.period=3", "evaluation.eval_period_iterations=3")


def fail_at(monkeypatch, name):
    real = export.write_atomically

    def write(path, content):
        if path.parent.name == name:
            raise OutputError(f"{path} cannot be written (No space left on device)")
        real(path, content)

    monkeypatch.setattr(export, "write_atomically", write)


def test_an_export_that_fails_is_logged_and_the_run_goes_on(tiny, tmp_path, monkeypatch, caplog):
    fail_at(monkeypatch, "training_2")
    tiny.start(tmp_path / "run", *OPTIONS)
    (message,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert "export after iteration 2 has failed, the run goes on" in message
    assert "teacher_checkpoint.pth" in message
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"model_0000002", "model_final"} <= names
    assert (tmp_path / "run" / "eval" / "training_5" / "teacher_checkpoint.pth").is_file()


def test_the_last_export_must_succeed_but_the_checkpoint_comes_first(tiny, tmp_path, monkeypatch):
    fail_at(monkeypatch, "training_5")
    with pytest.raises(OutputError, match="No space left"):
        tiny.start(tmp_path / "run", *OPTIONS)
    assert (tmp_path / "run" / "last_checkpoint.rank_0").read_text() == "model_final"


def test_rows_stay_in_a_file_that_cannot_be_rewritten(tmp_path, caplog):
    path, rows = tmp_path / "training_metrics.json", '{"iteration": 1}\n{"iteration": 7}\n'
    path.write_text(rows)
    (tmp_path / f".{path.name}.part").symlink_to("/dev/full")
    drop_rows_from(path, 3)
    assert not path.is_symlink() and path.read_text() == rows
    assert "No space left" in caplog.text
