"""Locks between real processes, and those that their owners have left behind."""

import json
import os
import resource
import signal
import socket
import time
from multiprocessing import get_context

import pytest

from dinov2.data import locks
from dinov2.data.locks import LockFile, one_at_a_time
from dinov2.errors import OutputError

FORK = get_context("fork")


@pytest.fixture(params=["hard links", "no hard links"])
def path(request, tmp_path, monkeypatch):
    """A lock in a folder that is not there yet; some file systems have no hard links."""
    if request.param == "no hard links":
        monkeypatch.setattr(os, "link", refuse_links)
    return tmp_path / "state" / "slide.lock"


def refuse_links(*_):
    raise PermissionError(1, "Operation not permitted")


def in_processes(function, *arguments):
    """Run a function in processes, one for every argument; return how they ended."""
    processes = [FORK.Process(target=function, args=argument) for argument in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def test_one_holder_at_a_time(path):
    first, second = LockFile(path), LockFile(path)
    assert not first.owned()
    assert first.acquire()
    assert not second.acquire()
    assert first.owned() and not second.owned()
    assert second.holder().startswith(f"process {os.getpid()} on {socket.gethostname()}, since 20")
    second.release()  # not its own: stays
    assert path.exists()
    first.release()
    assert second.acquire()
    assert [item.name for item in path.parent.iterdir()] == ["slide.lock"]


def take_and_die(path):
    assert LockFile(path).acquire()
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_lock_of_a_process_that_ended_is_taken_over(path):
    assert in_processes(take_and_die, (path,)) == [-signal.SIGKILL]
    assert json.loads(path.read_text())["pid"] != os.getpid()
    lock = LockFile(path)
    assert lock.acquire()
    assert lock.owned()
    assert [item.name for item in path.parent.iterdir()] == ["slide.lock"]


def test_a_process_that_nobody_has_waited_for_has_ended_too(path):
    child = os.fork()
    if not child:
        os._exit(0 if LockFile(path).acquire() else 1)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # it stays, as a zombie
    assert json.loads(path.read_text())["pid"] == child
    assert LockFile(path).acquire()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def change(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "pid", [os.getpid(), os.getppid(), 1, None], ids=["own", "parent", "another's", "none"]
)
def test_a_number_that_another_process_has_by_now_is_no_holder(path, pid):
    assert LockFile(path).acquire()
    change(path, born="12345", pid=pid)
    assert LockFile(path).acquire()


def age(path, seconds):
    os.utime(path, (0, time.time() - seconds))


def test_another_machine_counts_by_its_last_renewal(path, monkeypatch):
    monkeypatch.setattr(locks, "RENEW_SECONDS", 0.0)
    first = LockFile(path)
    assert first.acquire()
    change(path, machine="elsewhere")
    first._content = path.read_bytes()
    assert not LockFile(path, stale_seconds=60).acquire()
    age(path, 100)
    assert first.renew()
    assert not LockFile(path, stale_seconds=60).acquire()
    age(path, 100)
    second = LockFile(path, stale_seconds=60)
    assert second.acquire()
    assert not first.owned() and not first.renew()
    assert second.renew()


@pytest.mark.parametrize("text", ["", "[]", "no json", "\udcff"])
def test_a_lock_of_nobody_known_counts_by_its_age(path, text):
    path.parent.mkdir()
    path.write_text(text, "utf-8", "surrogateescape")
    lock = LockFile(path, stale_seconds=60)
    assert not lock.acquire()
    assert lock.holder() == "process unknown on unknown host, since an unknown time"
    age(path, 100)
    assert lock.acquire()
    assert [item.name for item in path.parent.iterdir()] == ["slide.lock"]


def test_renewal_shows_in_the_file_now_and_then(path):
    lock = LockFile(path)
    assert lock.acquire()
    age(path, 100)
    before = path.stat().st_mtime
    assert lock.renew() and path.stat().st_mtime == before  # not yet due
    lock._next_renewal = 0.0
    assert lock.renew() and path.stat().st_mtime > before
    path.unlink()
    lock._next_renewal = 0.0
    assert not lock.renew()


def take(path, barrier, queue):
    lock = LockFile(path)
    barrier.wait()
    queue.put(lock.acquire() and lock.owned())
    barrier.wait()  # nobody ends before all have tried


@pytest.mark.parametrize("stale", [False, True])
def test_of_many_at_once_one_gets_it(path, stale):
    for _ in range(5):
        path.unlink(missing_ok=True)
        if stale:
            assert LockFile(path).acquire()
            change(path, born="12345")
        barrier, queue = FORK.Barrier(6), FORK.Queue()
        assert in_processes(take, *[(path, barrier, queue)] * 6) == [0] * 6
        assert sum(queue.get(timeout=60) for _ in range(6)) == 1
        assert [item.name for item in path.parent.iterdir()] == ["slide.lock"]


def test_who_died_while_taking_over_is_waited_for_and_then_forgotten(path):
    assert LockFile(path).acquire()
    change(path, born="12345")
    right = path.with_name(".slide.lock.takeover")
    right.touch()
    lock = LockFile(path, stale_seconds=60)
    assert not lock.acquire()
    age(right, 100)
    assert lock.acquire()
    assert not right.exists()


def test_a_folder_that_can_not_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="can not write"):
        LockFile(tmp_path / "file" / "lock").acquire()
    with pytest.raises(OutputError, match='the index is not built yet and ".*file" can not be written'):
        one_at_a_time(tmp_path / "file" / "lock", what="the index").__enter__()


def acquire_on_a_full_disk(path):
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    with pytest.raises(OutputError, match="free some space"):
        LockFile(path).acquire()


def test_a_full_disk_keeps_nothing_of_a_lock(path):
    assert in_processes(acquire_on_a_full_disk, (path,)) == [0]
    assert list(path.parent.iterdir()) == []


def count_up(lock, counter):
    for _ in range(25):
        with one_at_a_time(lock, what="the count"):
            number = int(counter.read_text())
            time.sleep(0.0005)  # time for others to read the same number
            counter.write_text(str(number + 1))


def test_one_after_the_other(tmp_path):
    lock, counter = tmp_path / "new" / ".lock", tmp_path / "counter"
    counter.write_text("0")
    assert in_processes(count_up, *[(lock, counter)] * 4) == [0] * 4
    assert counter.read_text() == "100"
    assert list(lock.parent.iterdir()) == []


def test_without_such_locks_the_work_is_done_all_the_same(tmp_path, monkeypatch, caplog):
    def unsupported(*_):
        raise OSError("no locks on this disk")

    monkeypatch.setattr("fcntl.flock", unsupported)
    with one_at_a_time(tmp_path / "lock", what="the index"):
        assert (tmp_path / "lock").exists()
    assert "has no locks (no locks on this disk)" in caplog.text
    assert list(tmp_path.iterdir()) == []
