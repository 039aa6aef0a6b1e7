"""Run-state checkpoints: one file for any number of processes, safe against being killed while saving.

Layout of a folder: ``model_<iteration>.rank_0.pth`` (the latest few), ``model_final.rank_0.pth`` and
``last_checkpoint.rank_0``, a text file with the name of the newest. Files hold plain tensors on the CPU and
plain Python values only, so that they load with ``weights_only=True`` on every machine.
"""

import logging
import re
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dinov2 import distributed
from dinov2.errors import OutputError, WeightsError, some_of
from dinov2.fsdp import files
from dinov2.fsdp.state import Checkpointable, gather, load_checkpointable, load_model, tensors

logger = logging.getLogger("dinov2")

# The file of rank 0 serves all ranks; the name is upstream's.
SUFFIX = ".rank_0.pth"
LAST_CHECKPOINT = "last_checkpoint.rank_0"
FINAL = f"model_final{SUFFIX}"
PERIODIC = re.compile(rf"model_\d+{re.escape(SUFFIX)}")


def rankstr() -> str:
    """Return ``rank_<global rank>``, the part of a file name that tells processes apart."""
    return f"rank_{distributed.get_global_rank()}"


class FSDPCheckpointer:
    """Saves and restores a model together with what else a run needs to continue.

    Every method must be called by all processes: sharded parameters are gathered, and the processes agree
    on the file by a broadcast. Only the main process writes, to a folder that all can read.

    Args:
        model: Sharded or not; stored under ``model``.
        save_dir: Folder of the checkpoints.
        save_to_disk: False turns :meth:`save` off; must be the same on all processes.
        max_to_keep: How many periodic checkpoints stay, at least 1.
        checkpointables: Stored under their names.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        save_to_disk: bool = True,
        max_to_keep: int = 3,
        **checkpointables: Checkpointable,
    ) -> None:
        self.model = model
        self.save_dir = str(save_dir)
        self.save_to_disk = save_to_disk and bool(self.save_dir)
        self.max_to_keep = max(max_to_keep, 1)
        self.checkpointables = checkpointables

    def save(self, name: str, **extra: Any) -> None:
        """Write ``<save_dir>/<name>.rank_0.pth``, point ``last_checkpoint`` at it and prune old checkpoints.

        Args:
            name: ``model_<iteration>`` or ``model_final``.
            extra: Further plain values, such as ``iteration``.

        Raises:
            OutputError: The disk is full or the folder cannot be written.
        """
        if not self.save_to_disk:
            return
        state = self._gathered_state(extra)
        if not distributed.is_main_process():
            return
        path = Path(self.save_dir, f"{name}{SUFFIX}")
        files.write_atomically(path, lambda file: torch.save(state, file))
        self.tag_last_checkpoint(path.name)
        self._prune(keep=path)
        logger.info("saved the run state to %s", path)

    def rehearse(self, **extra: Any) -> None:
        """Do everything :meth:`save` does except writing the file, so that no run fails at its first save.

        Raises:
            OutputError: The folder cannot be written or the disk has no room for one checkpoint.
        """
        if not self.save_to_disk:
            return
        state = self._gathered_state(extra)
        if not distributed.is_main_process():
            return
        probe = Path(self.save_dir, "rehearsal")
        files.write_atomically(probe, lambda file: file.write(b"can be written"))
        probe.unlink()
        needed = (sum(tensor.nbytes for tensor in tensors(state)) + self._moments_to_come()) / 2**20
        free = shutil.disk_usage(self.save_dir).free / 2**20
        if free < needed:
            raise OutputError(
                f"a checkpoint takes {needed:.0f} MiB but {self.save_dir} has only {free:.0f} MiB left: free "
                "some space or choose another --output-dir"
            )

    def _moments_to_come(self) -> int:
        """Bytes that optimizers will add: Adam's two moments per parameter that has not been stepped yet."""
        optimizers = [
            value for value in self.checkpointables.values() if isinstance(value, torch.optim.Optimizer)
        ]
        return sum(
            2 * parameter.nbytes
            for optimizer in optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter not in optimizer.state
        )

    def has_checkpoint(self) -> bool:
        """Return whether there is something to resume from."""
        return bool(self.get_checkpoint_file())

    def get_checkpoint_file(self) -> str:
        """Return the path of the checkpoint to resume from first, an empty string when there is none."""
        candidates = self._candidates() if distributed.is_main_process() else []
        return distributed.broadcast_object(str(candidates[0]) if candidates else "")

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Name the checkpoint that the next resume starts from."""
        if distributed.is_main_process():
            text = last_filename_basename.encode()
            files.write_atomically(Path(self.save_dir, LAST_CHECKPOINT), lambda file: file.write(text))

    def load(self, path: str, checkpointables: Collection[str] | None = None) -> dict[str, Any]:
        """Load the model and, where named, the other objects from ``path``.

        Args:
            path: A file written by :meth:`save`; an empty path loads nothing.
            checkpointables: Names to load beside the model; None means all.

        Returns:
            What else the file holds, such as ``iteration``.

        Raises:
            WeightsError: The file is damaged, is unsafe to unpickle or does not fit the model.
        """
        return self._restore(files.read(Path(path)), path, checkpointables) if path else {}

    def resume_or_load(self, path: str = "", resume: bool = True) -> dict[str, Any]:
        """Continue from the newest readable checkpoint of the folder, else load only the model from ``path``.

        When the newest file cannot be read, the one before it is taken and a warning says so.

        Returns:
            What else the file holds; empty when nothing was loaded.

        Raises:
            WeightsError: There are checkpoints but none can be read, or the file does not fit the model.
        """
        if not (resume and self.has_checkpoint()):
            return self.load(path, checkpointables=())
        # Only the main process judges the files, lest two processes resume from different ones.
        chosen, problem, state = "", "", None
        if distributed.is_main_process():
            chosen, problem, state = self._newest_readable()
        chosen, problem = distributed.broadcast_object((chosen, problem))
        if not chosen:
            raise WeightsError(problem)
        return self._restore(files.read(Path(chosen)) if state is None else state, chosen, None)

    def _gathered_state(self, extra: dict[str, Any]) -> dict[str, Any]:
        sources = {"model": self.model} | self.checkpointables
        assert not set(sources) & set(extra), f"{sorted(set(sources) & set(extra))} cannot be stored twice"
        state = {name: source.state_dict() for name, source in sources.items()} | extra
        return {name: gather(value, name) for name, value in state.items()}

    def _restore(
        self, state: dict[str, Any], path: str, checkpointables: Collection[str] | None
    ) -> dict[str, Any]:
        if "model" not in state:
            raise WeightsError(
                f'{path} has no entry "model" (it has {some_of(state, 5)}): name a run '
                "state such as model_final.rank_0.pth"
            )
        rest = {name: value for name, value in state.items() if name not in {"model", *self.checkpointables}}
        try:
            load_model(self.model, state["model"])
            for name, target in self.checkpointables.items():
                if checkpointables is not None and name not in checkpointables:
                    continue
                if name in state:
                    load_checkpointable(target, state[name])
                else:
                    logger.warning("%s has no entry %s: it starts afresh", path, name)
        except (RuntimeError, ValueError, KeyError) as error:
            raise WeightsError(
                f"{path} does not fit this run: use the config it was trained with, or another --output-dir "
                f"({' '.join(str(error).split())[:400]})"
            ) from error
        logger.info("loaded the run state from %s", path)
        return rest

    def _candidates(self) -> list[Path]:
        """Checkpoints in the order to try them in: the tagged one, the newest periodic, the final one."""
        if not self.save_dir:
            return []
        tag = Path(self.save_dir, LAST_CHECKPOINT)
        tagged = [Path(self.save_dir, tag.read_text().strip())] if tag.is_file() else []
        if tagged and not tagged[0].is_file():
            logger.warning("%s names %s, which does not exist; looking for others", tag, tagged[0].name)
        ordered = [*tagged, *self._periodic(), Path(self.save_dir, FINAL)]
        return [path for path in dict.fromkeys(ordered) if path.is_file()]

    def _periodic(self) -> list[Path]:
        """Periodic checkpoints, most recently written first, also those of before a resume."""
        folder = Path(self.save_dir)
        paths = [path for path in folder.glob("model_*") if PERIODIC.fullmatch(path.name)]
        return sorted(paths, key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True)

    def _newest_readable(self) -> tuple[str, str, dict[str, Any] | None]:
        """Return the first readable checkpoint with its content, or the reason why there is none."""
        problems = []
        for path in self._candidates():
            try:
                state = files.read_verified(path)
            except WeightsError as error:
                problems.append(str(error))
                continue
            for problem in problems:
                logger.warning("%s; resuming from the older %s instead", problem, path.name)
            return str(path), "", state
        problem = (
            f"none of the {len(problems)} checkpoints in {self.save_dir} can be read: start over with "
            f"--no-resume or in another --output-dir (first problem: {problems[0]})"
        )
        return "", problem, None

    def _prune(self, keep: Path) -> None:
        """Delete all but the newest periodic checkpoints, and what killed saves left behind."""
        for path in self._periodic()[self.max_to_keep :]:
            if path != keep:
                path.unlink(missing_ok=True)
        for path in Path(self.save_dir).glob(files.temporary_name(Path(f"*{SUFFIX}")).name):
            path.unlink(missing_ok=True)
