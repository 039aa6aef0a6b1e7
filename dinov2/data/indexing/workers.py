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
) -> Iterator[Any]:
    """Yield ``function(*item)`` of every item, in any order.

    Args:
        function: of a module's top level.
        items: its arguments.
        workers: how many; up to 1 means this thread alone, which also begins the work in any case.
        tick: called at least about every second.
        processes: workers are processes, for what keeps Python busy; else threads, for what mostly waits.

    Raises:
        OutputError: a worker died.
    """
    start = time.monotonic()
    done = 0
    while done < len(items) and (workers <= 1 or not done or time.monotonic() - start < ALONE_SECONDS):
        yield function(*items[done])
        done += 1
        tick()
    if done < len(items):
        chunk = _chunk_size((time.monotonic() - start) / done, (len(items) - done) / workers)
        make = _processes if processes else ThreadPoolExecutor
        yield from _shared(make(workers), function, items[done:], workers, chunk, tick)


def _chunk_size(seconds_per_item: float, items_per_worker: float) -> int:
    """Return how many items make a message worth its way, and leave no worker without work at the end."""
    by_time = CHUNK_SECONDS / max(seconds_per_item, 1e-9)
    return max(1, min(int(by_time), int(items_per_worker / 4), LARGEST_CHUNK))


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
) -> Iterator[Any]:
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
                yield from future.result()
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
