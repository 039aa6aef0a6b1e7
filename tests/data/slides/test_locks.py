"""Locks between real processes."""

import json
import os
import signal
from multiprocessing import get_context

import pytest

from dinov2.data.slides.locks import SlideLock


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state" / "slide.lock"


def test_one_holder_at_a_time(path):
    first, second = SlideLock(path), SlideLock(path)
    assert first.acquire()
    assert not second.acquire()
    assert first.owned() and not second.owned()
    second.release()  # not its own: stays
    assert path.exists()
    first.release()
    assert second.acquire()
    assert [item.name for item in path.parent.iterdir()] == ["slide.lock"]


def _take_and_die(path):
    assert SlideLock(path).acquire()
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_lock_of_a_process_that_ended_is_taken_over(path):
    process = get_context("fork").Process(target=_take_and_die, args=(path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert path.exists()
    lock = SlideLock(path)
    assert lock.acquire()
    assert lock.owned()


def change(path, **changes):
    held = json.loads(path.read_text())
    path.write_text(json.dumps(held | changes))


def test_a_number_that_another_process_has_by_now_is_no_holder(path):
    assert SlideLock(path).acquire()
    change(path, started="12345")
    assert SlideLock(path).acquire()


def test_another_machine_counts_by_its_last_renewal(path):
    first = SlideLock(path)
    assert first.acquire()
    change(path, machine="elsewhere")
    assert not SlideLock(path, stale_seconds=60).acquire()
    os.utime(path, (0, path.stat().st_mtime - 100))
    first.renew()
    assert not SlideLock(path, stale_seconds=60).acquire()
    os.utime(path, (0, path.stat().st_mtime - 100))
    second = SlideLock(path, stale_seconds=60)
    assert second.acquire()
    assert not first.owned()


def _take(path, barrier, queue):
    lock = SlideLock(path)
    barrier.wait()
    queue.put(lock.acquire())
    barrier.wait()  # nobody ends before all have tried


@pytest.mark.parametrize("stale", [False, True])
def test_of_many_at_once_one_gets_it(path, stale):
    if stale:
        assert SlideLock(path).acquire()
        change(path, started="12345")
    context = get_context("fork")
    for _ in range(3):
        barrier, queue = context.Barrier(6), context.Queue()
        processes = [context.Process(target=_take, args=(path, barrier, queue)) for _ in range(6)]
        for process in processes:
            process.start()
        won = [queue.get(timeout=60) for _ in processes]
        for process in processes:
            process.join()
        assert sum(won) == 1
