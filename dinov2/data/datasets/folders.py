"""Folders with all that lies below, also behind links, and the files in them that fit a pattern."""

import logging
import os
from collections.abc import Iterable, Iterator, Set
from pathlib import Path, PurePath

from dinov2.errors import DatasetError

logger = logging.getLogger("dinov2")

Place = tuple[int, int]  # device and number of a folder on it


def folders_below(folder: str, outside: Set[Place] = frozenset()) -> Iterator[tuple[str, list[str]]]:
    """Yield a folder and all below it with the names of their files; nothing when it is missing.

    Links to folders are followed; files and folders whose names begin with a dot are passed over. A folder
    that can not be listed is left out with a warning.

    Args:
        folder: where to look.
        outside: folders that lie around it; links back to one of them are not followed.
    """
    pending = [(folder, frozenset(outside))]
    while pending:
        parent, around = pending.pop()
        try:
            place = place_of(parent)
            if place in around:
                continue
            with os.scandir(parent) as listing:
                entries = [entry for entry in listing if entry.name[0] != "."]
        except FileNotFoundError:
            continue
        except OSError as error:
            logger.warning('"%s" can not be listed and is left out: %s', parent, error)
            continue
        names = []
        for entry in entries:
            if is_folder(entry):
                pending.append((entry.path, around | {place}))
            else:
                names.append(entry.name)
        yield parent, names


def place_of(folder: str) -> Place:
    """Return what is the same for all paths to a folder."""
    status = os.stat(folder)  # noqa: PTH116 - plain strings, there may be millions
    return status.st_dev, status.st_ino


def is_folder(entry: os.DirEntry) -> bool:
    """Whether an entry of a folder is one itself, or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def files_matching(root: str, pattern: str, *, example: str = "*.tar") -> set[Path]:
    """Return the files below a folder whose paths fit a pattern; none when nothing fits.

    Args:
        root: the folder.
        pattern: a path below it, in which ``*`` and ``?`` stand for parts of names and ``**`` for folders, as
            :func:`folders_below` finds them.
        example: a pattern for the error.

    Raises:
        DatasetError: it is no pattern: empty, from ``/`` on, or with ``**`` in a name.
    """
    parts = PurePath(pattern).parts
    # What Path.glob refuses, and with which error, depends on the version of Python.
    if not parts or PurePath(pattern).is_absolute() or any("**" in part and part != "**" for part in parts):
        raise DatasetError(
            f'the pattern "{pattern}" is no pattern below root: write {example} or **/{example}'
        )
    return {path for path in _expand(Path(root), parts) if path.is_file()}


def _expand(folder: Path, parts: tuple[str, ...]) -> set[Path]:
    """Return what the parts of a pattern find; ``**`` of Path.glob would not enter links."""
    if "**" not in parts:
        return set(folder.glob("/".join(parts))) if parts else {folder}
    at = parts.index("**")
    starts = _expand(folder, parts[:at])
    below = {Path(found) for start in starts if start.is_dir() for found, _ in folders_below(str(start))}
    return {path for start in below for path in _expand(start, parts[at + 1 :])}


def without_repeats(root: str, paths: Iterable[str | Path]) -> list[str]:
    """Return the paths below a folder in order, of several to one file through linked folders the first.

    A path without links goes before all others; links to files stay, whatever they lead to.

    Args:
        root: the folder.
        paths: of files below it, each beginning with ``root``.
    """
    straight, chosen = Path(root).resolve(), {}
    for path in sorted(map(str, paths)):
        file = Path(path).parent.resolve() / Path(path).name
        if file not in chosen or file == straight / Path(path).relative_to(root):
            chosen[file] = path
    return sorted(chosen.values())
