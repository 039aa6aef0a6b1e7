"""Calls a function for many items in several threads or processes."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any

from dinov2.errors import OutputError

ALONE_SECONDS = 0.05  # small trees are done before others would have started
WAITING_SHARE = 0.5  # of the time; from there on it pays to wait in several threads at once
CHUNK_SECONDS = 0.03
LARGEST_CHUNK = 512
TICK_SECONDS = 1.0
_CHUNKS_AHEAD = 3  # per worker


def default_workers() -> int:
    """Return a number of processes: some more than cores, as on network file systems they mostly wait."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(32, 2 * cores)


def results(
    function: Callable[..., Any],
    items: Sequence[tuple],
    workers: int,
    tick: Callable[[], None],
    *,
    processes: bool,
) -> Iterator[list[Any]]:
    """Yield lists of ``function(*item)`` until every item has had its turn, in any order.

    Args:
        function: of a module's top level.
        items: its arguments.
        workers: how many at most; up to 1 means this thread alone, which also begins the work in any case.
        tick: called at least about every second.
        processes: workers are processes, for what keeps Python busy; else threads, for what mostly waits:
            they begin once the work is seen to wait.

    Raises:
        OutputError: a worker died.
    """
    done, chunk = 0, 1
    spent = busy = 0.0
    while done < len(items):
        if (
            workers > 1
            and done
            and spent >= ALONE_SECONDS
            and (processes or busy < (1 - WAITING_SHARE) * spent)
        ):
            chunk = min(chunk, max(1, int((len(items) - done) / workers / 4)))
            make = _processes if processes else ThreadPoolExecutor
            yield from _shared(make(workers), function, items[done:], workers, chunk, tick)
            return
        batch = items[done : done + chunk]
        start, started = time.monotonic(), time.thread_time()
        found = _call_all(function, batch)
        seconds = time.monotonic() - start
        spent, busy = spent + seconds, busy + time.thread_time() - started
        yield found
        tick()
        done += len(batch)
        chunk = _chunk_size(seconds / len(batch))


def _chunk_size(seconds_per_item: float) -> int:
    """Return how many items make a message worth its way."""
    return max(1, min(int(CHUNK_SECONDS / max(seconds_per_item, 1e-9)), LARGEST_CHUNK))


def _processes(workers: int) -> Executor:
    # A copy of this process is there in a moment; elsewhere than on Linux copies are not safe.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    return ProcessPoolExecutor(workers, context, _enter_worker, (os.getpid(),))


def _shared(
    pool: Executor,
    function: Callable[..., Any],
    items: Sequence[tuple],
    workers: int,
    chunk: int,
    tick: Callable[[], None],
) -> Iterator[list[Any]]:
    starts = iter(range(0, len(items), chunk))

    def submit(count: int) -> set[Future]:
        return {pool.submit(_call_all, function, items[i : i + chunk]) for i in islice(starts, count)}

    try:
        pending = submit(_CHUNKS_AHEAD * workers)
        while pending:
            finished, pending = wait(pending, TICK_SECONDS, FIRST_COMPLETED)
            # Before the results are handed on: all may have finished, and the loop ends without any pending.
            pending |= submit(_CHUNKS_AHEAD * workers - len(pending))
            for future in finished:
                yield future.result()
            tick()
    except BrokenProcessPool as error:
        raise OutputError(
            "a worker of the index builder ended unexpectedly, perhaps for want of memory: run the command "
            "again, which resumes, with fewer --workers"
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _call_all(function: Callable[..., Any], items: Sequence[tuple]) -> list[Any]:
    return [function(*item) for item in items]


def _enter_worker(parent: int) -> None:
    """Leave Ctrl-C to the parent, and do not outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(TICK_SECONDS)
    os._exit(1)
