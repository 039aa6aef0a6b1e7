"""What can befall a loader's worker processes, each in one sentence that says what to do.

PyTorch reports a dead or silent worker as a bare RuntimeError: from the loader's iterator, or, by way of the
signal SIGCHLD, from whatever line the main process happens to be at. :func:`translate` is the one place that
knows its wordings; :class:`WatchedLoader` and :func:`explained` are the two ways to it.
"""

import errno
import re
import signal
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from dinov2.errors import DataLoadingError, UserError

WORKERS = "the data loading processes"
THIS_PROCESS = "this process"
END_SECONDS = 5.0  # for a killed worker to be gone

MANY_FILES = (
    "too many files are open: raise the limit (ulimit -n 65536 in the shell that starts the run), or use "
    "fewer workers (train.num_workers)"
)
NO_MEMORY = (
    "memory has run out: use fewer workers (train.num_workers), a smaller train.prefetch_factor or a smaller "
    "batch"
)
NO_SHARED_MEMORY = (
    "shared memory, through which workers hand over their batches, has run out: enlarge /dev/shm (docker run "
    "--shm-size=16g, or --ipc=host), or use fewer workers (train.num_workers) or a smaller "
    "train.prefetch_factor"
)
LACKING = {
    errno.EMFILE: MANY_FILES,
    errno.ENFILE: MANY_FILES,
    errno.ENOMEM: NO_MEMORY,
    errno.EAGAIN: "no further process may be started: raise the limit (ulimit -u) or use fewer workers",
}
PROCESS_STATES = {
    "R": "computing",
    "S": "waiting",
    "D": "waiting for storage",
    "T": "stopped by a signal",
    "Z": "ended",
}

_DEAD = re.compile(
    r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by signal: ([\w ]+)|exited (.*))"
)
_LATE = re.compile(r"DataLoader timed out after (\S+) seconds")
_NO_ROOM = re.compile(
    r"</torch_\w+>.*(?:No space left|Cannot allocate)|unable to (?:mmap|resize file) .*/?torch_"
)
_HANDLES = re.compile(r"Too many open files|items of anc(?:illary )?data", re.IGNORECASE)


def lacking_resource(error: BaseException) -> str:
    """Return what to do if ``error`` says that the machine ran out of something; else an empty string."""
    if isinstance(error, MemoryError):
        return NO_MEMORY
    return LACKING.get(error.errno, "") if isinstance(error, OSError) else ""


def translate(error: Exception, workers: str = "", *, subject: str = WORKERS) -> UserError | None:
    """Return the sentence for an error of a loader, None if the error is none of a loader's.

    An error of ours that a worker has passed on comes with the worker's traceback in its text; it is returned
    without.

    Args:
        error: what was raised.
        workers: the state of the worker processes, for the sentence about those that do not answer.
        subject: what ran when the machine had no more of something.
    """
    text = str(error)
    if isinstance(error, UserError):
        return _without_traceback(error) if "Original Traceback" in text else None
    # An iterator that waits hides the signal's news, which say what the worker died of, behind its own.
    dead = _DEAD.search(str(error.__cause__)) or _DEAD.search(text)
    late = _LATE.search(text)
    if dead:
        return DataLoadingError(_death(dead))
    if late:
        return DataLoadingError(
            f"the data loading processes gave no batch for {float(late[1]):g} s (train.worker_timeout)"
            f"{f': {workers}' if workers else ''}; see whether the storage of the images answers, use more "
            "workers (train.num_workers) if it is only slow, or raise train.worker_timeout"
        )
    if _NO_ROOM.search(text):
        return DataLoadingError(NO_SHARED_MEMORY)
    advice = lacking_resource(error)
    if advice:
        return DataLoadingError(f"{subject} can not go on{_object_of(error)}: {advice}")
    return DataLoadingError(MANY_FILES) if _HANDLES.search(text) else None


def _object_of(error: Exception) -> str:
    """Say, in brackets, which file it was or how much memory, if the error knows."""
    known = error.filename if isinstance(error, OSError) else str(error)
    # What a worker has passed on is its whole traceback.
    return f" ({known})" if known and "\n" not in str(known) else ""


def _death(dead: re.Match) -> str:
    pids, by_signal, exited = dead[1].strip(), (dead[2] or "").strip(), dead[3] or ""
    who = f"the data loading process {pids}"
    if by_signal == "Bus error":
        return f"{who} died of a bus error: {NO_SHARED_MEMORY}"
    if by_signal in ("Killed", "Terminated"):
        return (
            f"{who} was ended from outside (signal {by_signal}), most often by the system because memory had "
            "run out (see dmesg): use fewer workers (train.num_workers) or a smaller train.prefetch_factor"
        )
    how = f"died (signal {by_signal})" if by_signal else f"ended by itself ({exited.split('.')[0]})"
    return (
        f"{who} {how}; what it wrote last stands above, and with train.num_workers=0 the training process "
        "itself reads, where a debugger sees the failure"
    )


def _without_traceback(error: UserError) -> UserError:
    last = str(error).strip().splitlines()[-1]
    return type(error)(last.removeprefix(f"{type(error).__module__}.{type(error).__qualname__}: "))


@contextmanager
def explained(workers: "_Workers | None" = None, *, subject: str = THIS_PROCESS) -> Iterator[None]:
    """Turn what befalls workers inside the block into :class:`DataLoadingError`; also serves as a decorator.

    Memory and file handles may also run out in what this process does itself, such as saving a checkpoint.
    Other errors, and the end of an iteration, pass as they are.

    Args:
        workers: to end after a failure.
        subject: what does the work of the block.
    """
    try:
        yield
    except (UserError, RuntimeError, OSError, MemoryError, EOFError) as error:
        # What a process that dies while it hands a batch over leaves behind.
        broken_off = workers is not None and isinstance(error, EOFError | ConnectionError)
        news = RuntimeError(workers.death()) if broken_off else error
        translated = translate(news, workers.describe() if workers else "", subject=subject)
        if translated is None:
            raise
        if workers and isinstance(translated, DataLoadingError):
            workers.end()
        try:
            raise translated from error
        finally:
            # Else frames and errors hold each other, and workers whose loader is left to the garbage
            # collector take seconds to end. The lines of the traceback stay.
            traceback.clear_frames(error.__traceback__)
            del translated


class WatchedLoader(DataLoader):
    """A ``DataLoader`` whose failures are :class:`~dinov2.errors.DataLoadingError`, and which can be left.

    At the end of a process PyTorch waits for its workers, for ever if one is stopped or hangs. They are
    therefore killed after a failure.
    """

    def __iter__(self) -> Iterator[Any]:
        with explained(subject=WORKERS if self.num_workers else THIS_PROCESS):
            return _WatchedIterator(super().__iter__())


class _WatchedIterator:
    def __init__(self, batches: Any) -> None:
        self._batches = batches
        self._workers = _Workers(batches)
        event = getattr(batches, "_workers_done_event", None)
        if event is not None and not isinstance(event, _DoneEvent):  # workers that stay have had theirs
            batches._workers_done_event = _DoneEvent(event)

    def __iter__(self) -> "_WatchedIterator":
        return self

    def __len__(self) -> int:
        return len(self._batches)

    def __next__(self) -> Any:
        with explained(self._workers, subject=self._workers.subject):
            return next(self._batches)


class _DoneEvent:
    """Tells workers that no more batches are wanted, unless one of them died while it was looking.

    An event of ``multiprocessing`` has a lock, which a worker that is killed may hold; PyTorch would wait for
    it for ever. Workers that are not told are terminated by PyTorch seconds later.
    """

    def __init__(self, event: Any) -> None:
        self._event = event
        self._is_set = False

    def set(self) -> None:
        """Set the event if its lock can be had."""
        self._is_set = True
        lock = self._event._cond  # which has no public name
        if lock.acquire(timeout=END_SECONDS):
            lock.release()
            self._event.set()

    def is_set(self) -> bool:
        """Return whether :meth:`set` was called; only this process does."""
        return self._is_set


class _Workers:
    """The worker processes of one of PyTorch's iterators; none with ``num_workers=0``."""

    def __init__(self, batches: Any) -> None:
        self._batches = batches
        self._processes = list(getattr(batches, "_workers", ()))

    @property
    def subject(self) -> str:
        """Who reads."""
        return WORKERS if self._processes else THIS_PROCESS

    def describe(self) -> str:
        """Return each process with its state, and which one the next batch is due from."""
        # PyTorch keeps no public record of who is to deliver what.
        tasks, awaited = (getattr(self._batches, name, None) for name in ("_task_info", "_rcvd_idx"))
        debtor = (tasks or {}).get(awaited, (None,))[0]
        states = [f"process {process.pid} is {_state(process.pid)}" for process in self._processes]
        return ", ".join(
            f"{state} and owes the next batch" if number == debtor else state
            for number, state in enumerate(states)
        )

    def death(self) -> str:
        """Return in PyTorch's words which process has died, in a while at most; empty if none has."""
        end = time.monotonic() + END_SECONDS
        try:
            while time.monotonic() < end:
                for process in self._processes:
                    if process.exitcode is not None and process.exitcode < 0:
                        died_of = signal.strsignal(-process.exitcode)
                        return f"DataLoader worker (pid {process.pid}) is killed by signal: {died_of}."
                    if process.exitcode:
                        return f"DataLoader worker (pid {process.pid}) exited with {process.exitcode}."
                time.sleep(0.01)
        except RuntimeError as news:  # PyTorch's own, of the same death
            return str(news)
        return ""

    def end(self) -> None:
        """Kill the processes. SIGTERM, which PyTorch sends, does not reach one that is stopped."""
        on_main = threading.current_thread() is threading.main_thread()
        # PyTorch's handler would report each of these deaths as another failure.
        handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if on_main else None
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join(END_SECONDS)
        if on_main:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL if handler is None else handler)


def _state(pid: int) -> str:
    try:
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):  # no such process, or no Linux
        return "in an unknown state"
    return PROCESS_STATES.get(letter, f"in state {letter}")
