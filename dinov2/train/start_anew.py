"""``--no-resume``: what an earlier run left is moved into a sub-folder, once per job, and never deleted."""

import json
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dinov2 import distributed
from dinov2.errors import ConfigError, OutputError, UserError, some_of
from dinov2.fsdp import checkpoint_paths
from dinov2.train.monitoring.best import BEST, FOLDERS
from dinov2.train.monitoring.records import RECORDS_FILE, START_FILE
from dinov2.train.output_lock import is_earlier_start, job_details
from dinov2.train.run_state import METRICS_FILE

logger = logging.getLogger("dinov2")

# Tells which job has moved the files of the run before it aside.
MARKER = ".started_anew"


def start_anew(cfg: DictConfig) -> bool:
    """Begin a run with ``--no-resume`` and return whether it resumes all the same.

    A launcher that starts a job again repeats its command. Then the run goes on from what its own earlier
    start has saved, if that start has come as far as here. To be called by all processes, with the lock held.

    Raises:
        ConfigError: the config names something that would be moved.
        OutputError: the files can not be moved.
    """
    launcher = f"{socket.gethostname()}:{os.getppid()}"
    launchers = sorted(set(distributed.all_gather_objects(launcher)))
    marker = Path(cfg.train.output_dir, MARKER)
    again = distributed.broadcast_object(distributed.is_main_process() and _is_restart(marker, launcher))
    if again:
        logger.info("--no-resume held for the first start of this job; now it continues what it began")
        return True
    set_aside(cfg)
    problem = ""
    if distributed.is_main_process():
        try:
            marker.write_text(json.dumps({**job_details(os.environ), "launchers": launchers}))
        except OSError as error:
            problem = f"{marker} cannot be written ({error}): free some space or check the permissions"
    problem = distributed.broadcast_object(problem)
    if problem:
        raise OutputError(problem)
    return False


def _is_restart(marker: Path, launcher: str) -> bool:
    """Whether an earlier start of this job has left the marker."""
    try:
        left = json.loads(marker.read_bytes())
        launchers = left["launchers"]
    except (OSError, ValueError, TypeError, KeyError):
        return False
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0)
    return is_earlier_start(left, os.environ) or (restarts > 0 and launcher in launchers)


def set_aside(cfg: DictConfig) -> None:
    """Move checkpoints, metrics and config of an earlier run into ``before_<n>``; by all processes.

    Raises:
        ConfigError: the config names something that would be moved.
        OutputError: the files can not be moved.
    """
    problem: UserError | None = None
    if distributed.is_main_process():
        try:
            _move(Path(cfg.train.output_dir), cfg)
        except UserError as error:
            problem = error
        except OSError as error:
            problem = OutputError(
                f"what an earlier run left in {cfg.train.output_dir} can not be moved aside ({error}): check "
                "the permissions, or choose another --output-dir"
            )
    problem = distributed.broadcast_object(problem)
    if problem is not None:
        raise problem


def _move(folder: Path, cfg: DictConfig) -> None:
    # BEST links into FOLDERS, and so goes first.
    names = (METRICS_FILE, RECORDS_FILE, START_FILE, BEST, FOLDERS)
    paths = [*checkpoint_paths(folder), *(path for name in names if (path := folder / name).exists())]
    if not paths:
        return
    for key, text in _texts(OmegaConf.to_container(cfg)):
        named = Path(os.path.realpath(text))
        for path in paths:
            moved = Path(os.path.realpath(path))
            if named == moved or moved in named.parents:
                raise ConfigError(
                    f'{key} names "{text}", which --no-resume would move aside: choose another --output-dir'
                )
    config = folder / "config.yaml"
    target = _new_folder(folder)
    for path in [*paths, *([config] if config.exists() else [])]:
        path.rename(target / path.name)
    logger.info("--no-resume: %s of an earlier run moved to %s", some_of([p.name for p in paths], 3), target)


def _texts(values: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield each text of a config that may be a path, with its key."""
    if isinstance(values, dict):
        for name, value in values.items():
            yield from _texts(value, f"{key}.{name}" if key else str(name))
    elif isinstance(values, str) and values and "\0" not in values:
        yield key, values


def _new_folder(folder: Path) -> Path:
    number = 1
    while True:
        target = folder / f"before_{number}"
        try:
            target.mkdir()
        except FileExistsError:
            number += 1
        else:
            return target
