"""Workers that die, stall or lack something: real processes, real signals, one sentence each."""

import gc
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback

import numpy as np
import pytest
import torch

from dinov2.data import loader_errors
from dinov2.data.loader_errors import NO_MEMORY, WatchedLoader, explained, lacking_resource, translate
from dinov2.data.workers import worker_options
from dinov2.errors import ConfigError, DataLoadingError, DatasetError, ImageReadError
from tests.conftest import REPO


class Tiles(torch.utils.data.Dataset):
    """Item 5 does something to its process first."""

    def __init__(self, mishap=None, argument=None):
        self.mishap, self.argument = mishap, argument

    def __len__(self):
        return 64

    def __getitem__(self, index):
        if index == 5 and self.mishap is not None:
            self.mishap(self.argument)
        return torch.tensor(index)


def send_myself(number):
    os.kill(os.getpid(), number)
    time.sleep(60)  # a signal that is handled elsewhere may take its time


def read(path):
    return path.read_bytes()


def fail(error):
    raise error


def loader(mishap=None, argument=None, workers=2, timeout=60, **options):
    options = worker_options(workers, timeout=timeout, prefetch_factor=2, start_method="default") | options
    return WatchedLoader(Tiles(mishap, argument), batch_size=4, **options)


def failure_of(batches, kind=DataLoadingError):
    with pytest.raises(kind) as caught:
        list(batches)
    assert type(caught.value) is kind
    text = str(caught.value)
    del caught  # it holds this frame; workers whose loader is left to the garbage collector take 5 s to end
    assert "\n" not in text
    assert "Traceback" not in text
    return text


def worker_pids(text):
    return [int(pid) for pid in re.findall(r"process (\d+)", text)]


def is_gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_healthy_loader_gives_what_pytorch_gives(workers):
    batches = iter(loader(workers=workers))
    assert len(batches) == 16
    assert torch.cat(list(batches)).tolist() == list(range(64))
    twice = loader(workers=workers)
    assert [len(list(twice)) for _ in range(2)] == [16, 16]
    del twice
    gc.collect()  # which tells workers that stayed for both passes


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (signal.SIGKILL, ["ended from outside (signal Killed)", "memory", "train.num_workers"]),
        (signal.SIGBUS, ["bus error", "/dev/shm", "--shm-size", "train.prefetch_factor"]),
        (signal.SIGSEGV, ["died (signal Segmentation fault)", "train.num_workers=0"]),
    ],
)
def test_a_worker_that_dies_of_a_signal(number, words):
    text = failure_of(loader(send_myself, number))
    assert len(worker_pids(text)) == 1
    assert all(word in text for word in words), text


def test_a_worker_that_leaves():
    text = failure_of(loader(os._exit, 3))
    assert "ended by itself (unexpectedly with exit code 3)" in text


def test_a_worker_killed_while_the_main_process_computes():
    """The news arrives as a signal, at whatever line the main process is."""

    @explained()
    def train():
        batches = loader(workers=1)
        iterator = iter(batches)
        next(iterator)
        os.kill(iterator._workers._processes[0].pid, signal.SIGKILL)
        for _ in range(600):
            time.sleep(0.05)
        raise AssertionError("nobody told")

    with pytest.raises(DataLoadingError, match="signal Killed"):
        train()


def test_a_worker_killed_while_it_holds_what_all_share(monkeypatch):
    """A worker looks at every batch whether it shall end, and holds a lock meanwhile."""
    monkeypatch.setattr(loader_errors, "END_SECONDS", 0.2)
    iterator = iter(loader(workers=2))
    next(iterator)
    first, second = iterator._workers._processes
    assert iterator._batches._workers_done_event._event._cond.acquire(timeout=5)  # as the worker had it
    os.kill(first.pid, signal.SIGKILL)
    with pytest.raises(DataLoadingError, match="signal Killed"), explained():
        for _ in iterator:
            time.sleep(0.05)
    del iterator
    gc.collect()
    assert is_gone(first.pid) and is_gone(second.pid)


class BreaksOff:
    """Stands for PyTorch's iterator whose worker dies while it hands a batch over."""

    def __init__(self, error):
        self.error = error

    def __next__(self):
        raise self.error


@pytest.mark.parametrize(
    "error", [EOFError(), ConnectionResetError(104, "Connection reset by peer")], ids=repr
)
@pytest.mark.parametrize("killed", [True, False])
def test_a_batch_that_breaks_off_is_the_death_of_its_worker(monkeypatch, error, killed):
    monkeypatch.setattr(loader_errors, "END_SECONDS", 5.0 if killed else 0.2)
    iterator = iter(loader(workers=2))
    next(iterator)
    first, _ = iterator._workers._processes
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # else PyTorch tells of the death itself
    try:
        if killed:
            os.kill(first.pid, signal.SIGKILL)
        iterator._batches = BreaksOff(error)
        with pytest.raises(DataLoadingError if killed else type(error)) as caught:
            next(iterator)
    finally:
        iterator._workers.end()
        signal.signal(signal.SIGCHLD, handler)
    assert not killed or f"process {first.pid} was ended from outside (signal Killed)" in str(caught.value)


def test_a_stopped_worker_is_named_and_left_behind():
    # It stops while it reads: stopped while it hands a batch over, it would be waited for without a time-out.
    text = failure_of(loader(send_myself, signal.SIGSTOP, timeout=3))
    assert "is stopped by a signal and owes the next batch" in text
    assert "gave no batch for 3 s (train.worker_timeout)" in text
    assert "storage" in text
    assert len(worker_pids(text)) == 2
    assert all(is_gone(pid) for pid in worker_pids(text))


def test_storage_that_does_not_answer(tmp_path):
    """A pipe nobody writes to blocks its reader as a file system that stalls does."""
    os.mkfifo(tmp_path / "stalled.jpeg")
    text = failure_of(loader(read, tmp_path / "stalled.jpeg", timeout=3))
    assert "is waiting and owes the next batch" in text
    assert all(is_gone(pid) for pid in worker_pids(text))


SCRIPT = """
import logging, os, signal, sys
from dinov2 import cli
from tests.data.test_loader_errors import loader

def main():
    batches = iter(loader(timeout=3))
    os.kill(batches._workers._processes[1].pid, signal.SIGSTOP)
    for _ in batches:
        pass

cli.run(main)
"""


def fail_as_a_program(script):
    """Run a script that ends with status 1, and return what it wrote to standard error."""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=REPO,
        env={**os.environ, "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 1, done.stderr
    return done.stderr


def test_a_program_with_a_stopped_worker_ends():
    """PyTorch's own loader would wait for the worker at the end of the process."""
    said = fail_as_a_program(SCRIPT)
    assert said.startswith("error: the data loading processes gave no batch for 3 s")
    assert "Traceback" not in said


def test_another_loader_works_after_a_failure():
    failure_of(loader(send_myself, signal.SIGKILL))
    assert len(list(loader())) == 16
    assert "signal Killed" in failure_of(loader(send_myself, signal.SIGKILL))


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_of_ours_come_through_as_they_are(workers):
    cause = ImageReadError("can not read image for sample 5 (/a.png): cut off")
    assert failure_of(loader(fail, cause, workers), ImageReadError) == str(cause)
    assert failure_of(loader(fail, ConfigError("a key is wrong"), workers), ConfigError) == "a key is wrong"


def test_a_loader_goes_on_after_an_unreadable_image():
    """As PyTorch's does, for who catches the error."""
    batches = iter(loader(fail, ImageReadError("cut off"), workers=1))
    next(batches)
    with pytest.raises(ImageReadError):
        next(batches)
    assert torch.cat(list(batches)).tolist() == list(range(8, 64))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("error", [TypeError("of the program"), RuntimeError("shape mismatch")])
def test_errors_of_the_program_keep_their_traceback(workers, error):
    with pytest.raises(type(error), match=str(error)) as caught:
        list(loader(fail, error, workers))
    assert "fail" in (str(caught.value) if workers else str(caught.traceback[-1].name))
    traceback.clear_frames(caught.tb)  # which would keep the loader until its workers take 5 s to end


@pytest.mark.parametrize("workers", [0, 1])
def test_memory_and_file_handles(workers):
    assert "ulimit -n" in failure_of(
        loader(fail, DataLoadingError("x: raise the limit (ulimit -n)"), workers)
    )


def too_many_handles(path):
    """Open a file with the system's limit reached."""
    _, hard = limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with path.open("rb") as file:
        resource.setrlimit(resource.RLIMIT_NOFILE, (file.fileno() + 1, hard))
        try:
            path.open("rb").close()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_what_this_process_does_itself_is_not_blamed_on_the_workers(tmp_path):
    """Such as saving a checkpoint, while the loader's workers are well."""
    (tmp_path / "model.pth").write_bytes(b"x")

    @explained()
    def train(save, argument):
        for _ in loader(workers=1):
            save(argument)

    with pytest.raises(DataLoadingError) as caught:
        train(too_many_handles, tmp_path / "model.pth")
    assert str(caught.value).startswith(f"this process can not go on ({tmp_path}/model.pth): too many files")
    with pytest.raises(DataLoadingError, match=r"^this process can not go on \(Unable to .*: memory has run"):
        train(np.empty, 1 << 58)


@pytest.mark.parametrize(
    ("workers", "subject"), [(0, "this process"), (1, "the data loading processes")], ids=["here", "worker"]
)
def test_memory_that_a_loader_lacks(workers, subject):
    text = failure_of(loader(fail, MemoryError("1 TiB"), workers))
    assert text == f"{subject} can not go on{'' if workers else ' (1 TiB)'}: {NO_MEMORY}"


HANDLES = """
import resource, sys
from dinov2 import cli
from tests.data.test_loader_errors import loader

def main():
    batches = loader(workers=1, prefetch_factor=40)
    kept = [next(iter(loader(workers=0)))]  # everything that is opened once is open
    iterator = iter(batches)
    resource.setrlimit(resource.RLIMIT_NOFILE, (24, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    kept += iterator

cli.run(main)
"""


@pytest.mark.slow
def test_a_low_limit_of_open_files_is_explained():
    said = fail_as_a_program(HANDLES)
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, said
    assert "ulimit -n" in errors[0]


@pytest.mark.parametrize(
    ("error", "word"),
    [
        (RuntimeError("unable to write to file </torch_7_1>: No space left on device (28)"), "/dev/shm"),
        (
            RuntimeError("unable to mmap 602112 bytes from file </torch_7_1>: Cannot allocate memory"),
            "/dev/shm",
        ),
        (RuntimeError("received 0 items of ancdata"), "ulimit -n"),
        (RuntimeError("Too many open files. Communication with the workers is no longer"), "ulimit -n"),
        (OSError(24, "Too many open files"), "ulimit -n"),
        (OSError(12, "Cannot allocate memory"), "train.prefetch_factor"),
        (BlockingIOError(11, "Resource temporarily unavailable"), "ulimit -u"),
        (RuntimeError("DataLoader worker (pid(s) 12, 13) exited unexpectedly"), "process 12, 13 ended"),
    ],
)
def test_wordings_of_pytorch_and_the_system(error, word):
    translated = translate(error)
    assert type(translated) is DataLoadingError
    assert word in str(translated)


def test_other_errors_are_not_explained_away():
    for error in (RuntimeError("CUDA error"), OSError(2, "No such file"), ValueError("x"), DatasetError("y")):
        assert translate(error) is None
    assert lacking_resource(MemoryError())
    assert not lacking_resource(KeyError())
    for passing in (KeyboardInterrupt, StopIteration, GeneratorExit, SystemExit):
        with pytest.raises((passing, RuntimeError)) as caught, explained():
            raise passing
        assert caught.type is passing or isinstance(caught.value.__cause__, passing)


def test_iterating_in_a_thread_is_possible():
    """Signal handlers belong to the main thread alone."""
    texts = []
    thread = threading.Thread(target=lambda: texts.append(failure_of(loader(fail, DataLoadingError("x"), 1))))
    thread.start()
    thread.join(120)
    assert texts == ["x"]


def test_worker_options():
    given = worker_options(3, timeout=5.0, prefetch_factor=4, start_method="spawn")
    assert given == {
        "num_workers": 3,
        "persistent_workers": True,
        "timeout": 5.0,
        "prefetch_factor": 4,
        "multiprocessing_context": "spawn",
    }
    default = worker_options(3, timeout=5.0, prefetch_factor=None, start_method="default")
    assert default["multiprocessing_context"] is None
    once = worker_options(3, timeout=5.0, prefetch_factor=4, start_method="spawn", persistent=False)
    assert once == {**given, "persistent_workers": False}


def test_without_workers_it_says_that_nothing_limits_the_wait(caplog):
    with caplog.at_level("INFO", logger="dinov2"):
        assert worker_options(0, timeout=5.0, prefetch_factor=4, start_method="spawn") == {"num_workers": 0}
    assert "without train.worker_timeout" in caplog.text


def test_where_no_wait_is_limited_nothing_is_said(caplog):
    with caplog.at_level("INFO", logger="dinov2"):
        worker_options(0, timeout=0.0, prefetch_factor=None, start_method="default")
    assert caplog.text == ""
