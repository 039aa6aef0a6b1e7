"""``OUT/best``: the networks of the iteration that the run would ship now.

``best`` is a link to ``best_iterations/<iteration>``, a folder that is complete before the link names it. The
link is replaced by a rename, so a kill at any moment leaves the old choice or the new one, never a mixture.
Folders of earlier choices stay while a run that is resumed might come back to them. An iteration that is done
again, and differs, gets a folder ``<iteration>_2``, and so on.
"""

import contextlib
import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

from dinov2 import distributed
from dinov2.errors import OutputError
from dinov2.fsdp.files import write_atomically
from dinov2.train.monitoring.records import Record
from dinov2.train.monitoring.selection import Choice, name_of
from dinov2.utils.strict_json import to_json

logger = logging.getLogger("dinov2")

BEST = "best"
FOLDERS = "best_iterations"
SUMMARY = "best.json"
FOLDER_NAME = re.compile(r"(\d+)(?:_(\d+))?")


def update_best(
    output_dir: Path,
    choice: Choice,
    evaluated: int | None,
    export: Callable[[Path], None],
    *,
    needed: Collection[Record] = (),
) -> bool:
    """Make ``best`` hold the chosen iteration, as far as its networks are at hand. All processes call this.

    The networks of an iteration are at hand where it was evaluated just now, or where its folder is still
    there. A disk that is full keeps the old choice and is told of as an error: the run goes on.

    Args:
        output_dir: of the run.
        choice: what to ship.
        evaluated: iteration whose networks ``export`` writes; None where they are of no evaluation.
        export: writes the checkpoint files of the networks as they are now into a folder; all processes.
        needed: records whose folders stay beside that of the choice, such as the choices at the checkpoints
            to which a killed run may return.

    Returns:
        Whether ``best`` is of the chosen iteration now.
    """
    wanted = choice.best
    try:
        _on_main(lambda: _clear_remains(output_dir))
        if wanted.iteration == evaluated and _on_main(lambda: _folder_of(output_dir, wanted) is None):
            aside = output_dir / FOLDERS / f".{wanted.iteration}.new"
            export(aside)
            _on_main(lambda: _put_in_place(output_dir, aside, choice))
        if _on_main(lambda: _folder_of(output_dir, wanted) is None):
            held = _on_main(lambda: best_iteration(output_dir))
            logger.error(
                "%s/%s should be of %s, whose networks are not there: they could not be written, or a run "
                "that went back has replaced them. It stays as it is, %s, until another evaluation is chosen",
                *(output_dir, BEST, name_of(wanted)),
                "absent" if held is None else f"of iteration {held}",
            )
            return False
        _on_main(lambda: _point_to(output_dir, choice, [wanted, *needed]))
    except OutputError as error:
        logger.error("%s/%s keeps the earlier choice, and the run goes on: %s", output_dir, BEST, error)
        with contextlib.suppress(OutputError):  # the disk may be full, and a checkpoint is to come
            _on_main(lambda: _clear_remains(output_dir))
        return False
    return True


def best_iteration(output_dir: Path) -> int | None:
    """Return the iteration that ``best`` is of, None if there is none."""
    link = output_dir / BEST
    found = FOLDER_NAME.fullmatch(link.readlink().name) if link.is_symlink() else None
    return int(found[1]) if found and link.is_dir() else None


def _on_main(act: Callable[[], object]) -> object:
    """Return what the main process's call returns, or raise its OutputError, on all processes."""
    result, problem = None, ""
    if distributed.is_main_process():
        try:
            result = act()
        except OSError as error:  # OutputError is one
            problem = str(error)
    result, problem = distributed.broadcast_object((result, problem))
    if problem:
        raise OutputError(problem)
    return result


def _folder_of(output_dir: Path, record: Record) -> Path | None:
    """Return the folder that holds the networks of this very record."""
    for path in (output_dir / FOLDERS).glob(f"{record.iteration}*"):
        name = FOLDER_NAME.fullmatch(path.name)
        if name and int(name[1]) == record.iteration and _record_in(path) == _mark(record):
            return path
    return None


def _record_in(folder: Path) -> str | None:
    """Return the mark of the record that a folder is of, None where it does not tell."""
    try:
        return json.loads((folder / SUMMARY).read_text("utf-8"))["record"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _mark(record: Record) -> str:
    """A checksum of a record: an iteration that is done again with other data has another one."""
    return hashlib.sha256(record.line().encode()).hexdigest()


def _summary(choice: Choice) -> str:
    record = choice.best
    low, high = record.intervals.get(choice.signal, (None, None))
    content = {
        "iteration": record.iteration,
        "signal": choice.signal or None,
        "value": record.signals.get(choice.signal),
        "interval": None if low is None else [low, high],
        "why": choice.why,
        "record": _mark(record),
    }
    return to_json(content) + "\n"


def _put_in_place(output_dir: Path, aside: Path, choice: Choice) -> None:
    """Give a folder of exported networks its summary and a name that is free."""
    _write_summary(aside, choice)
    folder = first = output_dir / FOLDERS / str(choice.best.iteration)
    number = 1
    while folder.exists():
        number += 1
        folder = first.with_name(f"{first.name}_{number}")
    aside.rename(folder)


def _write_summary(folder: Path, choice: Choice) -> None:
    write_atomically(folder / SUMMARY, lambda file: file.write(_summary(choice).encode()))


def _point_to(output_dir: Path, choice: Choice, keep: Collection[Record]) -> None:
    """Make the link name the choice, bring its summary up to date, and delete what is not needed."""
    folder = _folder_of(output_dir, choice.best)
    if (folder / SUMMARY).read_text("utf-8") != _summary(choice):  # compared with more evaluations since
        _write_summary(folder, choice)
    link, target = output_dir / BEST, Path(FOLDERS, folder.name)
    if link.exists() and not link.is_symlink():
        raise OutputError(
            f"{link} is no link that a training made: move it away, or use another --output-dir"
        )
    if not (link.is_symlink() and link.readlink() == target):
        new = output_dir / f".{BEST}.new"
        new.unlink(missing_ok=True)
        new.symlink_to(target)
        new.replace(link)
        logger.info("%s now holds %s: %s", link, name_of(choice.best), choice.why)
    kept = [_folder_of(output_dir, record) for record in keep]
    for path in (output_dir / FOLDERS).iterdir():
        if path not in kept:
            gone = path.with_name(f".{path.name}.old")  # a kill while it is deleted leaves no half folder
            path.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)


def _clear_remains(output_dir: Path) -> None:
    """Delete what a kill has left half written."""
    folders = output_dir / FOLDERS
    if not folders.is_dir():
        return
    for path in folders.glob(".*"):
        shutil.rmtree(path, ignore_errors=True)
