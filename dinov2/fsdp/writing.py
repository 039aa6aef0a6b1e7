"""Writing one checkpoint folder with all processes, in the foreground or beside the training."""

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True)
class SaveOutcome:
    """How a save ended, the same on all processes.

    Attributes:
        name: of the checkpoint.
        iteration: zero-based, the last one done; None if it was not given.
        problem: why there is no such checkpoint; empty if there is.
        stalled_seconds: how long :meth:`FSDPCheckpointer.save` kept this process from training.
        seconds: how long the whole save took.
    """

    name: str
    iteration: int | None
    problem: str
    stalled_seconds: float
    seconds: float


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
        self.group = dist.new_group(backend="gloo") if distributed.is_enabled() else None

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
) -> str:
    """Write a checkpoint; to be called by all processes.

    Args:
        folder: of the checkpoints.
        job: what this process writes.
        group: of the processes.
        after: called by the main process once the checkpoint has its name, with its path.
        allowed: called by the main process before anything is written; raises where it must not be.

    Returns:
        why there is no checkpoint, an empty text if there is one; the same on all processes.
    """
    temporary = folder / layout.BEING_WRITTEN.format(job.name)
    is_main = distributed.is_main_process()

    def begin() -> None:
        if job.problem:
            raise RuntimeError(job.problem)
        if is_main:
            allowed()
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
                sequence=1 + max((number for _, number in layout.checkpoints(folder)), default=0),
                iteration=job.iteration,
                world_size=distributed.get_global_size(),
                files={name: entry for part in parts for name, entry in sorted(part.items())},
                versions={"torch": str(torch.__version__), "dinov2": dinov2.__version__},
            )
            layout.write_manifest(temporary, manifest)
            layout.publish(temporary, folder / job.name)
            after(folder / job.name)

    problem = _together(group, begin) or _together(group, write_tensors) or _together(group, describe)
    if not problem:
        parts = group.gather(described[0])
        problem = _together(group, finish)
    if problem and is_main:
        shutil.rmtree(temporary, ignore_errors=True)
    return problem


def _together(group: SaveGroup, step: Callable[[], None]) -> str:
    """Do a step in every process and return what went wrong in the first that failed."""
    return next(filter(None, group.gather(_attempt(step))), "")


def _attempt(step: Callable[[], None]) -> str:
    try:
        step()
    except dcp.api.CheckpointException as failure:
        rank, (error, _) = next(iter(failure.failures.items()))
        return _sentence(error, rank)
    except (OSError, RuntimeError, ValueError, MemoryError, UserError) as error:
        return _sentence(error, distributed.get_global_rank())
    return ""


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
