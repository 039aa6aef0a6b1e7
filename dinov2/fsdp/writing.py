"""Writing one checkpoint folder with all processes, in the foreground or beside the training."""

import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

import dinov2
from dinov2 import distributed
from dinov2.errors import UserError
from dinov2.fsdp import layout
from dinov2.fsdp.layout import Manifest
from dinov2.fsdp.staging import Piece, StagedPlanner

logger = logging.getLogger("dinov2")

# One slow write must not end a run, and a group whose message timed out is of no use any more. Processes that
# die close their connections; those that hang are the watchdog's.
SAVE_TIMEOUT = timedelta(days=30)

# What helps after a save that failed, for the sentence that ends a run.
FREE_SPACE = "free some space or check the permissions, and start again"
START_AGAIN = "start again"
SEE_OTHER_LOG = "see why that process ended, and start again"


@dataclass(frozen=True)
class Problem:
    """Why a save failed.

    Attributes:
        text: for a sentence.
        advice: what to do.
        taken: the folder has become another run's.
    """

    text: str
    advice: str = START_AGAIN
    taken: bool = False


@dataclass(frozen=True)
class SaveOutcome:
    """How a save ended, the same on all processes.

    Attributes:
        name: of the checkpoint.
        iteration: zero-based, the last one done; None if it was not given.
        problem: why there is no such checkpoint; empty if there is.
        stalled_seconds: how long :meth:`FSDPCheckpointer.save` kept this process from training.
        seconds: how long the whole save took.
        advice: what to do about the problem.
        taken: the folder has become another run's, in which nothing may be saved any more.
    """

    name: str
    iteration: int | None
    problem: str
    stalled_seconds: float
    seconds: float
    advice: str = ""
    taken: bool = False


@dataclass(frozen=True)
class Job:
    """What one process brings to a save."""

    name: str
    pieces: Mapping[str, Piece]
    state: Mapping[str, Any]  # for state.json, of the main process
    iteration: int | None
    problem: str  # found before, e.g. no memory for the copies


class SaveGroup:
    """The processes that save together. Their messages do not mix with those of the training."""

    def __init__(self) -> None:
        # gloo, because NCCL would need a GPU and the same order of messages from two threads.
        self.group = (
            dist.new_group(backend="gloo", timeout=SAVE_TIMEOUT) if distributed.is_enabled() else None
        )

    def gather(self, value: Any) -> list[Any]:
        """Return what every process gave."""
        if self.group is None:
            return [value]
        values = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(values, value, group=self.group)
        return values

    def close(self) -> None:
        """Leave the group, if all others still can."""
        if self.group is not None and distributed.is_enabled():
            dist.destroy_process_group(self.group)
        self.group = None


class _Writer(dcp.FileSystemWriter):
    """PyTorch's writer, without the path of this machine in what it writes, and naming a full disk."""

    def write_data(self, *arguments: Any) -> Any:
        try:
            return super().write_data(*arguments)
        except RuntimeError as error:
            # torch.save hides the reason behind what its own code finds next.
            reason = error.__context__
            while reason is not None and not isinstance(reason, OSError):
                reason = reason.__context__
            raise reason or error from None

    def storage_meta(self) -> Any:
        return dcp.metadata.StorageMeta()


def write(
    folder: Path, job: Job, group: SaveGroup, after: Callable[[Path], None], allowed: Callable[[], None]
) -> Problem | None:
    """Write a checkpoint; to be called by all processes.

    Args:
        folder: of the checkpoints.
        job: what this process writes.
        group: of the processes.
        after: called by the main process once the checkpoint has its name, with its path. The checkpoint
            is there, whatever this raises.
        allowed: called by the main process before anything is written; raises a UserError where the folder
            has become another run's.

    Returns:
        why there is no checkpoint, None if there is one; the same on all processes.

    Raises:
        RuntimeError: another process has ended or cannot be reached.
    """
    temporary = folder / layout.BEING_WRITTEN.format(job.name)
    is_main = distributed.is_main_process()

    def begin() -> None:
        if job.problem:
            raise RuntimeError(job.problem)
        if is_main:
            try:
                allowed()
            except UserError as error:
                raise _TakenError(str(error)) from error
            folder.mkdir(parents=True, exist_ok=True)
            layout.clear_leftovers(folder)
            temporary.mkdir()
            layout.write_text(temporary / layout.STATE, json.dumps(job.state))

    def write_tensors() -> None:
        dcp.save(
            {},
            storage_writer=_Writer(temporary, per_thread_copy_ahead=0),
            planner=StagedPlanner(job.pieces),
            process_group=group.group,
            no_dist=group.group is None,
        )

    described: list[dict[str, Any]] = []

    def describe() -> None:
        names = [path.name for path in temporary.glob(f"__{distributed.get_global_rank()}_*")]
        if is_main:
            names += [layout.METADATA, layout.STATE]
        described.append(layout.describe_files(temporary, names))

    def finish() -> None:
        if is_main:
            manifest = Manifest(
                name=job.name,
                sequence=1 + max([0, *(number for _, number in layout.checkpoints(folder))]),
                iteration=job.iteration,
                world_size=distributed.get_global_size(),
                files={name: entry for part in parts for name, entry in sorted(part.items())},
                versions={"torch": str(torch.__version__), "dinov2": dinov2.__version__},
            )
            layout.write_manifest(temporary, manifest)
            layout.publish(temporary, folder / job.name)
            try:
                after(folder / job.name)
            except Exception as error:
                logger.warning("%s is saved, but what follows has failed: %s", folder / job.name, error)

    problem = _together(group, begin) or _together(group, write_tensors) or _together(group, describe)
    if problem is None:
        parts = group.gather(described[0])
        problem = _together(group, finish)
    if problem is not None and is_main:
        shutil.rmtree(temporary, ignore_errors=True)
    return problem


class _TakenError(Exception):
    """The folder has become another run's."""


def _together(group: SaveGroup, step: Callable[[], None]) -> Problem | None:
    """Do a step in every process and return what went wrong in the first that failed."""
    return next((problem for problem in group.gather(_attempt(step)) if problem is not None), None)


def _attempt(step: Callable[[], None]) -> Problem | None:
    """Do a step and return what went wrong: whatever it is, the others wait for this process to tell."""
    try:
        step()
    except _TakenError as error:
        return Problem(str(error), taken=True)
    except (Exception, dcp.api.CheckpointException) as failure:  # PyTorch's is no Exception
        error, rank = failure, distributed.get_global_rank()
        if isinstance(failure, dcp.api.CheckpointException):
            rank, (error, _) = next(iter(failure.failures.items()))
        advice = FREE_SPACE if isinstance(error, OSError) else START_AGAIN
        return Problem(_sentence(error, rank), advice)
    return None


def _sentence(error: BaseException, rank: int) -> str:
    """What went wrong and where; PyTorch wraps a full disk into words of its own."""
    if isinstance(error, UserError):
        return str(error)
    code = getattr(error, "errno", None)
    text = os.strerror(code) if code else " ".join(str(error).split())[:200] or type(error).__name__
    name = getattr(error, "filename", None)
    where = f"process {rank}" + (f", {Path(str(name)).name}" if name else "")
    return f"{text} ({where})"


class Background:
    """Runs one function at a time beside the caller. The program ends only after it."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._result: Any = None

    def start(self, function: Callable[[], Any], *, wait: bool) -> None:
        """Run ``function``, whose predecessor must have been waited for.

        Args:
            function: must not raise.
            wait: until it is done, and run it here.
        """
        assert self._thread is None, "the one before has not been waited for"
        if wait:
            self._result = function()
            return
        self._result = None

        def run() -> None:
            self._result = function()

        self._thread = threading.Thread(target=run, name="checkpoint")
        self._thread.start()

    def result(self) -> Any:
        """Wait for the function and return its result, None before the first."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        return self._result


def seconds() -> float:
    """A clock that never goes backwards."""
    return time.monotonic()
