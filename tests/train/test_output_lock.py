"""One run per output directory: refusal, takeover, release."""

import errno
import json
import os
import subprocess
import sys
import threading
import time

import pytest

from dinov2.data.processes import this_process
from dinov2.errors import OutputError
from dinov2.train import output_lock
from dinov2.train.output_lock import FILE_NAME, OutputLock, is_earlier_start, job_details
from tests.conftest import REPO


def write_lock(folder, **changes):
    content = {**this_process(), "token": "other", **changes}
    (folder / FILE_NAME).write_text(json.dumps(content))


def test_a_second_run_is_refused_in_one_sentence_and_leaves_everything_alone(tiny, tmp_path):
    with OutputLock() as lock:
        lock.claim(str(tmp_path / "run"))
        with pytest.raises(OutputError, match=rf"process {os.getpid()} on .*, since 2") as caught:
            tiny.start(tmp_path / "run")
        assert len(str(caught.value).splitlines()) == 1
        assert [path.name for path in (tmp_path / "run").iterdir()] == [FILE_NAME]
    tiny.start(tmp_path / "run", "optim.max_iterations=3", "train.self_check=off")
    assert not (tmp_path / "run" / FILE_NAME).exists()


def test_a_killed_run_is_succeeded_at_once(tmp_path):
    code = (
        "import os, sys; from dinov2.train.output_lock import OutputLock; "
        "OutputLock().claim(sys.argv[1]); os.kill(os.getpid(), 9)"
    )
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=env).returncode == -9
    assert (tmp_path / FILE_NAME).is_file()
    with OutputLock() as lock:
        lock.claim(str(tmp_path))
        lock.check()


def test_a_run_elsewhere_that_shows_itself_is_left_alone(tmp_path, monkeypatch):
    write_lock(tmp_path, machine="elsewhere", host="node7", pid=11)
    path = tmp_path / FILE_NAME
    monkeypatch.setattr(output_lock.time, "sleep", lambda _: os.utime(path))
    with pytest.raises(OutputError, match="process 11 on node7"):
        OutputLock().claim(str(tmp_path))


def test_a_run_elsewhere_that_is_silent_is_succeeded_in_the_end(tmp_path, monkeypatch, caplog):
    write_lock(tmp_path, machine="elsewhere", host="node7")
    old = time.time() - output_lock.STALE_SECONDS + 1
    os.utime(tmp_path / FILE_NAME, (old, old))
    monkeypatch.setattr(output_lock, "POLL_SECONDS", 0.2)
    with OutputLock() as lock:
        lock.claim(str(tmp_path))
    assert "on node7" in caplog.text


def test_the_next_start_of_a_job_does_not_wait(tmp_path, monkeypatch, caplog):
    write_lock(tmp_path, machine="elsewhere", SLURM_JOB_ID=["77", 0])
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with OutputLock() as lock:
        lock.claim(str(tmp_path))
    assert "waiting" not in caplog.text


@pytest.mark.parametrize(
    ("holder", "expected"),
    [
        ({"SLURM_JOB_ID": ["77", 0]}, True),
        ({"SLURM_JOB_ID": ["77", 1]}, False),
        ({"SLURM_JOB_ID": ["78", 0]}, False),
        ({"SLURM_JOB_ID": "77"}, False),
        ({}, False),
    ],
)
def test_earlier_starts_of_a_job(holder, expected):
    environment = {"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "1", "TORCHELASTIC_RUN_ID": "none"}
    assert job_details(environment) == {"SLURM_JOB_ID": ["77", 1]}
    assert is_earlier_start(holder, environment) is expected


def test_a_run_whose_directory_was_taken_over_writes_no_checkpoint(tmp_path):
    with OutputLock() as lock:
        lock.claim(str(tmp_path))
        write_lock(tmp_path)
        with pytest.raises(OutputError, match="another run has taken over"):
            lock.check()


def test_a_file_server_that_is_away_does_not_end_the_renewal(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(output_lock, "RENEW_SECONDS", 0.02)
    with OutputLock() as lock:
        lock.claim(str(tmp_path))
        tries, again = [], threading.Event()

        def renew():
            tries.append(len(tries))
            if len(tries) == 1:
                raise OSError(errno.ESTALE, "Stale file handle")
            again.set()
            return True

        monkeypatch.setattr(lock._lock, "renew", renew)
        assert again.wait(60)
    assert "is not renewed" in caplog.text and "Stale file handle" in caplog.text


def test_a_lock_that_cannot_be_given_back_is_only_logged(tmp_path, monkeypatch, caplog):
    lock = OutputLock()
    lock.claim(str(tmp_path))

    def stale():
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(lock._lock, "release", stale)
    lock.release()
    assert "cannot be given back" in caplog.text


def test_a_deleted_lock_is_told_as_that(tmp_path):
    with OutputLock() as lock:
        lock.claim(str(tmp_path))
        (tmp_path / FILE_NAME).unlink()
        with pytest.raises(OutputError, match="was deleted"):
            lock.check()
