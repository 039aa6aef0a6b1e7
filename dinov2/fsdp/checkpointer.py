"""Run-state checkpoints: a folder for any number of processes, safe against being killed while saving.

Layout of a run: ``model_<iteration>/`` (the latest few), ``model_final/`` and ``last_checkpoint.rank_0``, a
text file with the name of the newest. What is in a folder: :mod:`dinov2.fsdp.layout`. Old files
``model_<iteration>.rank_0.pth`` with everything in one are read, no longer written.
"""

import logging
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dinov2 import distributed
from dinov2.errors import OutputError, UserError, WeightsError, counted, some_of
from dinov2.fsdp import files, layout, random_state, reading
from dinov2.fsdp.encoding import decode, encode
from dinov2.fsdp.staging import Stage
from dinov2.fsdp.state import (
    Checkpointable,
    load_checkpointable,
    load_model,
    load_named_optimizer_state,
    named_optimizer_state,
)
from dinov2.fsdp.writing import (
    SEE_OTHER_LOG,
    Background,
    Job,
    Problem,
    SaveGroup,
    SaveOutcome,
    seconds,
    write,
)

logger = logging.getLogger("dinov2")

LAST_CHECKPOINT = "last_checkpoint.rank_0"
# Files of one piece, written by earlier versions and by DINOv2 itself without sharding.
OLD_FINAL = "model_final.rank_0.pth"
OLD_PERIODIC = re.compile(r"model_\d+\.rank_0\.pth")


def rankstr() -> str:
    """Return ``rank_<global rank>``, the part of a file name that tells processes apart."""
    return f"rank_{distributed.get_global_rank()}"


def checkpoint_paths(folder: Path) -> list[Path]:
    """Return all that is there of the checkpoints of a run, with the tag; nobody may be saving.

    Raises:
        OSError: what saves that were killed have left can not be put right.
    """
    layout.clear_leftovers(folder)
    tag, final = folder / LAST_CHECKPOINT, folder / OLD_FINAL
    old = [path for path in folder.glob("model_*.pth") if OLD_PERIODIC.fullmatch(path.name)]
    folders = [path for path, _ in layout.checkpoints(folder)]
    return [path for path in (tag, final, *sorted(old), *sorted(folders)) if path.exists()]


class FSDPCheckpointer:
    """Saves and restores a model together with what else a run needs to continue.

    Every method must be called by all processes, in the same order. All of them write, to a folder that all
    share, and agree on how a save ended and on what is loaded. The random generators of every process are
    stored, and restored on as many processes.

    Args:
        model: Sharded or not; stored under ``model``.
        save_dir: Folder of the checkpoints.
        save_to_disk: False turns :meth:`save` off; must be the same on all processes.
        max_to_keep: How many periodic checkpoints stay, at least 1.
        keep_every: Those after a multiple of so many iterations stay for ever; None for none.
        asynchronous: Write while the training goes on. Takes memory for a copy of this process's share.
        may_write: Called by the main process before every save; raises a UserError if the folder has become
            another run's.
        checkpointables: Stored under their names.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        save_to_disk: bool = True,
        max_to_keep: int = 3,
        keep_every: int | None = None,
        asynchronous: bool = False,
        may_write: Callable[[], None] = lambda: None,
        **checkpointables: Checkpointable,
    ) -> None:
        self.model = model
        self.save_dir = str(save_dir)
        self.save_to_disk = save_to_disk and bool(self.save_dir)
        self.max_to_keep = max(max_to_keep, 1)
        self.keep_every = keep_every
        self.asynchronous = asynchronous
        self.may_write = may_write
        self.checkpointables = checkpointables
        self._group = SaveGroup()
        self._stage = Stage()
        self._background = Background()
        self._newest: tuple[str, int | None, float] | None = None  # name, iteration, when by seconds()

    def save(self, name: str, **extra: Any) -> None:
        """Begin to write ``<save_dir>/<name>/``, after a save that is still running.

        When it is complete, ``last_checkpoint`` points at it and old checkpoints are deleted. When it fails,
        on any process, what was there before stays, and the log says so; :meth:`wait` tells, too.

        Args:
            name: ``model_<iteration>`` or ``model_final``.
            extra: Further plain values and tensors, such as ``iteration``; those of the main process count.

        Raises:
            OutputError: The folder has become another run's, on all processes.
        """
        if not self.save_to_disk:
            return
        assert layout.NAME.fullmatch(name), f"{name} is no name of a checkpoint"
        self._stop_if_taken()
        started = seconds()
        shared, own, state = self._collect(extra)
        pieces, problem = {}, ""
        try:
            pieces = self._stage.copy(shared, own)
        except (RuntimeError, MemoryError) as error:
            problem = " ".join(str(error).split())[:200]
        job = Job(name, pieces, state, extra.get("iteration"), problem)
        stalled = seconds() - started

        def work() -> SaveOutcome:
            try:
                problem = write(Path(self.save_dir), job, self._group, self._completed, self.may_write)
            except Exception as error:  # errors of this process do not come so far
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                here = distributed.get_global_rank()
                problem = Problem(
                    f"another process has ended or cannot be reached, told to process {here}: {reason}",
                    SEE_OTHER_LOG,
                )
            text, advice, taken = (
                ("", "", False) if problem is None else (problem.text, problem.advice, problem.taken)
            )
            outcome = SaveOutcome(
                name, job.iteration, text, stalled, seconds() - started, advice=advice, taken=taken
            )
            self._report(outcome)
            return outcome

        self._background.start(work, wait=not self.asynchronous)
        if not self.asynchronous:
            self._stop_if_taken()

    def _stop_if_taken(self) -> None:
        """Wait for the last save and end the run if the folder was found to be another run's."""
        outcome = self.wait()
        if outcome is not None and outcome.taken:
            raise OutputError(f"this run stops without saving {outcome.name}: {outcome.problem}")

    def require_own_folder(self) -> None:
        """Make sure that the folder is still this run's.

        Raises:
            OutputError: It has become another run's; on all processes.
        """
        problem = ""
        if distributed.is_main_process():
            try:
                self.may_write()
            except (UserError, OSError) as error:
                problem = str(error)
        problem = distributed.broadcast_object(problem)
        if problem:
            raise OutputError(problem)

    def wait(self, *, must_succeed: bool = False) -> SaveOutcome | None:
        """Wait until no save is running and return how the last one ended, None before the first.

        Args:
            must_succeed: raise if it failed.

        Raises:
            OutputError: it failed, on all processes.
        """
        outcome = self._background.result()
        if must_succeed and outcome is not None and outcome.taken:
            raise OutputError(f"this run stops without saving {outcome.name}: {outcome.problem}")
        if must_succeed and outcome is not None and outcome.problem:
            raise OutputError(
                f"{outcome.name} could not be saved to {self.save_dir} ({outcome.problem}); "
                f"{self._newest_good(outcome)}: {outcome.advice}"
            )
        return outcome

    def close(self) -> None:
        """Wait for a running save; nothing can be saved afterwards."""
        self.wait()
        self._group.close()
        self.save_to_disk = False

    def rehearse(self, **extra: Any) -> None:
        """Do all that :meth:`save` does except writing a checkpoint, so that no run fails at its first save.

        Raises:
            OutputError: A process cannot write to the folder, or the disk has no room for one checkpoint.
        """
        if not self.save_to_disk:
            return
        shared, own, _ = self._collect(extra)
        self._stage.copy(shared, own)  # takes the memory, so that the first save need not
        folder = Path(self.save_dir)
        probe = folder / f".rehearsal.{rankstr()}"
        problem = ""
        try:
            files.write_atomically(probe, lambda file: file.write(b"can be written"))
            probe.unlink()
            needed = (sum(tensor.nbytes for tensor in shared.values()) + self._moments_to_come()) / 2**20
            free = shutil.disk_usage(folder).free / 2**20
            if free < needed:
                problem = (
                    f"a checkpoint takes {needed:.0f} MiB but {folder} has only {free:.0f} MiB left: free "
                    "some space or choose another --output-dir"
                )
        except OutputError as error:
            problem = str(error)
        problem = next(filter(None, distributed.all_gather_objects(problem)), "")
        if problem:
            raise OutputError(problem)

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
        self.wait()
        candidates = self._candidates() if distributed.is_main_process() else []
        return distributed.broadcast_object(str(candidates[0]) if candidates else "")

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Name the checkpoint that the next resume starts from."""
        if distributed.is_main_process():
            text = last_filename_basename.encode()
            files.write_atomically(Path(self.save_dir, LAST_CHECKPOINT), lambda file: file.write(text))

    def load(
        self,
        path: str,
        checkpointables: Collection[str] | None = None,
        *,
        accept: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> dict[str, Any]:
        """Load the model and, where named, the other objects from ``path``.

        Args:
            path: A folder written by :meth:`save` or an old file; an empty path loads nothing.
            checkpointables: Names to load beside the model; None means all, and the random generators.
            accept: Called with what is returned before anything is loaded; may raise to refuse it.

        Returns:
            What else the checkpoint holds, such as ``iteration``.

        Raises:
            WeightsError: It is damaged, is unsafe to unpickle or does not fit the model.
        """
        if not path:
            return {}
        self.wait()
        if Path(path).is_dir():
            problem = self._verify(Path(path))
            if problem:
                raise WeightsError(problem)
        return self._restore(Path(path), checkpointables, accept)

    def resume_or_load(
        self,
        path: str = "",
        resume: bool = True,
        *,
        accept: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> dict[str, Any]:
        """Continue from the newest readable checkpoint of the folder, else load only the model from ``path``.

        When the newest one cannot be read, the one before it is taken and a warning says so.

        Args:
            path: as of :meth:`load`.
            resume: False looks at ``path`` only.
            accept: as of :meth:`load`, for a checkpoint that is continued.

        Returns:
            What else the checkpoint holds; empty when nothing was loaded.

        Raises:
            WeightsError: There are checkpoints but none can be read, or one does not fit the model.
        """
        self.wait()
        candidates = self._candidates() if resume and distributed.is_main_process() else []
        candidates = distributed.broadcast_object(candidates)
        if not candidates:
            return self.load(path, checkpointables=())
        problems = []
        for candidate in candidates:
            problem = self._verify(candidate)
            if not problem:
                if distributed.is_main_process():
                    for earlier in problems:
                        logger.warning("%s; resuming from the older %s instead", earlier, candidate.name)
                return self._restore(candidate, None, accept)
            problems.append(problem)
        raise WeightsError(
            f"none of the {len(problems)} checkpoints in {self.save_dir} can be read: start over with "
            f"--no-resume or in another --output-dir (first problem: {problems[0]})"
        )

    def _names(self) -> dict[torch.Tensor, str]:
        return {parameter: name for name, parameter in self.model.named_parameters()}

    def _object_state(self, target: Checkpointable) -> Mapping[str, Any]:
        if isinstance(target, torch.optim.Optimizer):
            return named_optimizer_state(target, self._names())
        return target.state_dict()

    def _collect(
        self, extra: dict[str, Any]
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, Any]]:
        """Return the tensors all processes have, those of this process only, and the text part."""
        reserved = {"model", "random_state", *self.checkpointables}
        assert not reserved & set(extra), f"{sorted(reserved & set(extra))} cannot be stored twice"
        shared = {f"model.{name}": value.detach() for name, value in self.model.state_dict().items()}
        objects = {
            name: encode(self._object_state(target), name, shared)
            for name, target in self.checkpointables.items()
        }
        coded = {name: encode(value, name, shared) for name, value in extra.items()}
        own = {f"random_state.{rankstr()}.{kind}": value for kind, value in random_state.capture().items()}
        return shared, own, {"objects": objects, "extra": coded}

    def _verify(self, path: Path) -> str:
        """Return why a checkpoint cannot be read, an empty text if it can; the processes share the work."""
        if not path.is_dir():
            problem = ""
            if distributed.is_main_process():
                try:
                    files.read_verified(path)
                except WeightsError as error:
                    problem = str(error)
            return distributed.broadcast_object(problem)
        try:
            manifest = layout.read_manifest(path)
            rank, size = distributed.get_global_rank(), distributed.get_global_size()
            problem = layout.damage(path, manifest, sorted(manifest.files)[rank::size])
            problem = f"the checkpoint {problem}" if problem else ""
            if not problem and distributed.is_main_process():
                reading.read_index(path, manifest)
                reading.read_state(path)
        except WeightsError as error:
            problem = str(error)
        return next(filter(None, distributed.all_gather_objects(problem)), "")

    def _restore(
        self,
        path: Path,
        checkpointables: Collection[str] | None,
        accept: Callable[[Mapping[str, Any]], None] | None,
    ) -> dict[str, Any]:
        wanted = {
            name: target
            for name, target in self.checkpointables.items()
            if checkpointables is None or name in checkpointables
        }
        read = self._read_folder if path.is_dir() else self._read_file
        try:
            rest, missing = read(path, wanted, accept or (lambda _: None), checkpointables is None)
        except UserError:
            raise
        except (RuntimeError, ValueError, KeyError) as error:
            raise WeightsError(
                f"{path} does not fit this run: use the config it was trained with, or another --output-dir "
                f"({' '.join(str(error).split())[:400]})"
            ) from error
        for name in missing:
            logger.warning("%s has no entry %s: it starts afresh", path, name)
        logger.info("loaded the run state from %s", path)
        if str(path.parent) == str(Path(self.save_dir)):
            self._newest = (path.name, rest.get("iteration"), seconds())
        return rest

    def _read_file(
        self, path: Path, wanted: Mapping[str, Checkpointable], accept: Callable, _: bool
    ) -> tuple[dict[str, Any], list[str]]:
        """Load an old file; return what else it holds and which objects it lacks."""
        state = files.read(path)
        if "model" not in state:
            raise WeightsError(
                f'{path} has no entry "model" (it has {some_of(state, 5)}): name a run '
                "state such as model_final or model_final.rank_0.pth"
            )
        rest = {name: value for name, value in state.items() if name not in {"model", *self.checkpointables}}
        accept(rest)
        load_model(self.model, state["model"])
        for name in wanted.keys() & state.keys():
            load_checkpointable(wanted[name], state[name])
        return rest, sorted(wanted.keys() - state.keys())

    def _read_folder(
        self, path: Path, wanted: Mapping[str, Checkpointable], accept: Callable, with_random_state: bool
    ) -> tuple[dict[str, Any], list[str]]:
        """Load a verified folder; return what else it holds and which objects it lacks."""
        manifest = layout.read_manifest(path)
        index, coded = reading.read_index(path, manifest), reading.read_state(path)
        entries = index.state_dict_metadata
        tensors = {name: reading.blank(entry) for name, entry in entries.items() if _is_extra(name, coded)}
        reading.fill(path, index, tensors)
        rest = decode(coded["extra"], tensors.__getitem__)
        accept(rest)

        model = {f"model.{name}": value.detach() for name, value in self.model.state_dict().items()}
        _require_same_tensors(model, {name: entries[name] for name in entries if name.startswith("model.")})
        targets = dict(model)
        places = self._optimizer_places(wanted)

        def target(name: str) -> torch.Tensor:
            place, entry = places.get(name.rpartition(".")[0]), entries[name]
            if place is not None and place.shape == entry.size:
                targets[name] = torch.zeros_like(place.detach(), dtype=entry.properties.dtype)
            else:
                targets[name] = reading.blank(entry)
            return targets[name]

        states = {
            name: decode(coded["objects"][name], target) for name in wanted.keys() & coded["objects"].keys()
        }
        prefix = f"random_state.{rankstr()}."
        own = [name for name in entries if name.startswith(prefix)]
        use_own = with_random_state and manifest.world_size == distributed.get_global_size()
        targets.update({name: reading.blank(entries[name]) for name in own if use_own})
        reading.fill(path, index, targets)
        for name, state in states.items():
            if isinstance(wanted[name], torch.optim.Optimizer):
                load_named_optimizer_state(wanted[name], self._names(), state)
            else:
                wanted[name].load_state_dict(state)
        if own and use_own:
            random_state.restore({name[len(prefix) :]: targets[name] for name in own})
        return rest, sorted(wanted.keys() - states.keys())

    def _optimizer_places(self, wanted: Mapping[str, Checkpointable]) -> dict[str, torch.Tensor]:
        """Return the parameters that optimizers keep state of, by the names of their states."""
        names = self._names()
        return {
            f"{name}.state.{names[parameter]}": parameter
            for name, target in wanted.items()
            if isinstance(target, torch.optim.Optimizer)
            for group in target.param_groups
            for parameter in group["params"]
        }

    def _candidates(self) -> list[Path]:
        """Checkpoints in the order to try them in: the tagged one, then by their numbers, then old files."""
        if not self.save_dir:
            return []
        folder = Path(self.save_dir)
        tag = folder / LAST_CHECKPOINT
        tagged = [folder / tag.read_text().strip()] if tag.is_file() else []
        if tagged and not tagged[0].exists():
            logger.warning("%s names %s, which does not exist; looking for others", tag, tagged[0].name)
        folders = [path for path, _ in layout.checkpoints(folder)]
        ordered = [*tagged, *folders, *self._old_periodic(), folder / OLD_FINAL]
        return [path for path in dict.fromkeys(ordered) if path.exists() and path != folder]

    def _old_periodic(self) -> list[Path]:
        """Old periodic files, most recently written first."""
        folder = Path(self.save_dir)
        paths = [path for path in folder.glob("model_*.pth") if OLD_PERIODIC.fullmatch(path.name)]
        return sorted(paths, key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True)

    def _completed(self, path: Path) -> None:
        """Point at a checkpoint that is complete, and delete those that it makes superfluous."""
        try:
            self.tag_last_checkpoint(path.name)
        except OutputError as error:
            # Without a tag the newest is found by its number.
            logger.warning("%s is saved, but not named as the newest: %s", path, error)
            Path(self.save_dir, LAST_CHECKPOINT).unlink(missing_ok=True)
        folders = [
            entry
            for entry, number in layout.checkpoints(path.parent)
            if number != layout.UNREAD and not entry.name.endswith("final")
        ]
        passing = [entry for entry in [*folders, *self._old_periodic()] if not self._stays(entry)]
        for superfluous in passing[self.max_to_keep :]:
            if superfluous == path:
                continue
            try:
                layout.remove(superfluous)
            except OSError as error:
                logger.warning("the old checkpoint %s cannot be deleted (%s)", superfluous, error)

    def _stays(self, path: Path) -> bool:
        """Whether a checkpoint is kept for ever."""
        if not self.keep_every or not path.is_dir():
            return False
        return (int(path.name.removeprefix("model_")) + 1) % self.keep_every == 0

    def _report(self, outcome: SaveOutcome) -> None:
        """Write into the log how a save ended, and remember the newest checkpoint that is good."""
        if not outcome.problem:
            self._newest = (outcome.name, outcome.iteration, seconds())
            if distributed.is_main_process():
                logger.info("saved the run state to %s", Path(self.save_dir, outcome.name))
        elif distributed.is_main_process():
            logger.error(
                "%s could not be saved to %s (%s): the run goes on, but after a failure it would have to "
                "start from an older state: %s",
                *(outcome.name, self.save_dir, outcome.problem, self._newest_good(outcome)),
            )

    def _newest_good(self, failed: SaveOutcome) -> str:
        if self._newest is None:
            return "there is no checkpoint of this run"
        name, iteration, when = self._newest
        behind = ""
        if iteration is not None and failed.iteration is not None:
            behind = f"{counted(failed.iteration - iteration, 'iteration')} and "
        return f"the newest good one is {name}, {behind}{(seconds() - when) / 60:.0f} minutes older"


def _is_extra(name: str, coded: Mapping[str, Any]) -> bool:
    """Whether a tensor belongs to what was stored beside the objects."""
    first = re.split(r"[.\[]", name, maxsplit=1)[0]
    return first in coded["extra"]


def _require_same_tensors(present: Mapping[str, torch.Tensor], stored: Mapping[str, Any]) -> None:
    """Compare names and shapes of a model with those of a checkpoint.

    Raises:
        ValueError: they differ.
    """
    problems = []
    for what, names in (
        ("missing", present.keys() - stored.keys()),
        ("unknown", stored.keys() - present.keys()),
    ):
        if names:
            problems.append(f"{what} tensors: {some_of(sorted(name[len('model.') :] for name in names), 3)}")
    shapes = [
        f"{name[len('model.') :]} has shape {tuple(stored[name].size)}, not {tuple(value.shape)}"
        for name, value in present.items()
        if name in stored and stored[name].size != value.shape
    ]
    if shapes:
        problems.append(some_of(shapes, 3))
    if problems:
        raise ValueError("; ".join(problems))
