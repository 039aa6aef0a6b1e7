"""One builder at a time, and locks that their owners have left behind."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest

from dinov2.data.indexing import lock as lock_module
from dinov2.data.indexing.lock import STALE_SECONDS, BuildLock
from dinov2.errors import OutputError


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new" / "builder.lock"


def test_held_and_released(path):
    with BuildLock(str(path)):
        holder = json.loads(path.read_text())
        assert (holder["pid"], holder["host"]) == (os.getpid(), socket.gethostname())
        with pytest.raises(OutputError, match=f"process {os.getpid()} on {socket.gethostname()}, since 20"):
            BuildLock(str(path)).__enter__()
        assert json.loads(path.read_text()) == holder
    assert list(path.parent.iterdir()) == []


def leave(path, **changes):
    """Leave the lock of a process that has ended."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    with BuildLock(str(path)):
        holder = {**json.loads(path.read_text()), "pid": ended.pid, **changes}
    path.write_text(json.dumps(holder))


@pytest.mark.parametrize(
    "changes",
    [{}, {"pid": os.getpid(), "born": "1"}, {"pid": os.getppid(), "born": "1"}],
    ids=["ended", "our number, other process", "another's number"],
)
def test_the_lock_of_a_dead_process_is_taken_over(path, changes):
    leave(path, **changes)
    with BuildLock(str(path)):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("text", [None, "", "[]", "no json"])
def test_a_lock_of_elsewhere_is_stale_when_its_heart_has_stopped(path, text):
    leave(path, host="elsewhere")
    if text is not None:
        path.write_text(text)
    with pytest.raises(OutputError, match="another process builds this index"):
        BuildLock(str(path)).__enter__()
    os.utime(path, (time.time() - STALE_SECONDS - 10,) * 2)
    with BuildLock(str(path)):
        pass
    assert list(path.parent.iterdir()) == []


def test_heartbeat(path, monkeypatch):
    monkeypatch.setattr(lock_module, "HEARTBEAT_SECONDS", 0.0)
    with BuildLock(str(path)) as lock:
        os.utime(path, (0, 0))
        lock.beat()
        assert path.stat().st_mtime > 1e9
        path.write_text("{}")
        with pytest.raises(OutputError, match="was deleted or taken by another builder"):
            lock.beat()
    assert path.read_text() == "{}"


def test_a_folder_that_can_not_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="can not write"):
        BuildLock(str(tmp_path / "file" / "lock")).__enter__()
