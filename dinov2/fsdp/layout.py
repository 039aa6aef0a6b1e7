"""The folder of one checkpoint, and which of the checkpoints of a run is the newest.

A checkpoint ``model_0000099`` is written as ``.model_0000099.tmp`` and renamed once all is on the disk. Its
``manifest.json`` lists every file with size and SHA-256 and has a checksum of its own. Checkpoints are
numbered in the order in which they were made; clocks play no part.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dinov2.errors import WeightsError

logger = logging.getLogger("dinov2")

MANIFEST = "manifest.json"
STATE = "state.json"
METADATA = ".metadata"
FORMAT_VERSION = 1
# The name in use and the two hidden ones: while being written, and while being replaced.
NAME = re.compile(r"model_(?:\d+|final)")
BEING_WRITTEN = ".{}.tmp"
BEING_REPLACED = ".{}.old"
# Numbers of checkpoints without one: damaged, and with a manifest that the system does not let read just now.
DAMAGED, UNREAD = -1, -2
_BLOCK = 2**22  # bytes hashed at a time


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is and of which bytes it consists."""

    name: str
    sequence: int  # larger than that of every checkpoint that was there when it was made
    iteration: int | None  # zero-based, the last one done
    world_size: int
    files: dict[str, dict[str, Any]]  # name -> bytes, sha256
    versions: dict[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest into a folder whose files are all on the disk.

    Raises:
        OSError: it can not be written.
    """
    content = asdict(manifest)
    write_text(folder / MANIFEST, json.dumps({**content, "checksum": _checksum(content)}, indent=1))
    sync_folder(folder)


def read_manifest(folder: Path) -> Manifest:
    """Read a manifest and compare its checksum.

    Raises:
        WeightsError: it is absent, damaged or of a newer version.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_bytes())
        checksum = content.pop("checksum")
        version = content["format_version"]
    except FileNotFoundError as error:
        if folder.is_dir() and not NAME.search(folder.name):
            raise WeightsError(
                f"{folder} is not a checkpoint of a run: these are folders such as model_0009999, with a "
                f"{MANIFEST}"
            ) from error
        raise WeightsError(f"the checkpoint {folder} is incomplete: it has no {MANIFEST}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(
            f"the checkpoint {folder} is damaged: {MANIFEST} can not be read ({error!r})"
        ) from (error)
    if checksum != _checksum(content):
        raise WeightsError(f"the checkpoint {folder} is damaged: the checksum of {MANIFEST} does not match")
    if version != FORMAT_VERSION:
        raise WeightsError(
            f"the checkpoint {folder} has format version {version}, this program reads {FORMAT_VERSION}: "
            "resume with the version of this package that wrote it"
        )
    return Manifest(**content)


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def describe_files(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return size and SHA-256 of files, once they are on the disk.

    Raises:
        OSError: one can not be read or synced.
    """
    described = {}
    for name in names:
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
            digest = _sha256(file)
            described[name] = {"bytes": file.tell(), "sha256": digest}
    return described


def damage(folder: Path, manifest: Manifest, names: Iterable[str]) -> str:
    """Return what is wrong with the files ``names`` of a checkpoint, an empty text if nothing is."""
    for name in names:
        expected = manifest.files[name]
        try:
            size = (folder / name).stat().st_size
            if size != expected["bytes"]:
                return f"{folder} is damaged: {name} has {size} bytes instead of {expected['bytes']}"
            with (folder / name).open("rb") as file:
                if _sha256(file) != expected["sha256"]:
                    return f"{folder} is damaged: the SHA-256 of {name} does not match"
        except OSError as error:
            return f"{folder} is damaged: {name} can not be read ({error.strerror or error})"
    return ""


def _sha256(file: Any) -> str:
    digest = hashlib.sha256()
    while block := file.read(_BLOCK):
        digest.update(block)
    return digest.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a text and force it to the disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Force the names in a folder to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def publish(temporary: Path, target: Path) -> None:
    """Give a complete folder its name. One of that name stays until the new one has it.

    Raises:
        OSError: the folders can not be renamed. What fails after that is only logged.
    """
    replaced = target.with_name(BEING_REPLACED.format(target.name))
    if target.exists():
        remove(replaced)
        target.rename(replaced)
    temporary.rename(target)
    try:
        sync_folder(target.parent)
        remove(replaced)
    except OSError as error:
        logger.warning("%s is there, but what follows has failed: %s", target, error)


def remove(path: Path) -> None:
    """Delete a checkpoint, a folder or an old file, if it is there; a kill leaves no half of it in sight.

    Raises:
        OSError: it can not be deleted.
    """
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    if not path.name.startswith("."):
        hidden = path.with_name(BEING_WRITTEN.format(path.name))
        if hidden.exists():
            shutil.rmtree(hidden)
        path = path.rename(hidden)
    shutil.rmtree(path)


def checkpoints(folder: Path) -> list[tuple[Path, int]]:
    """Return the checkpoint folders with their numbers, newest first; unreadable ones last.

    Those have the number ``DAMAGED``, or ``UNREAD`` where the manifest may be whole.

    One that was about to be replaced when the run was killed counts if nothing has its name.
    """
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        name = path.name[1 : -len(".old")] if path.name.startswith(".") else path.name
        known = NAME.fullmatch(name) and path.name in (name, BEING_REPLACED.format(name))
        if not known or not path.is_dir() or (path.name != name and (folder / name).exists()):
            continue
        try:
            sequence = read_manifest(path).sequence
        except WeightsError as error:
            reason = error.__cause__
            hidden = isinstance(reason, OSError) and not isinstance(reason, FileNotFoundError)
            sequence = UNREAD if hidden else DAMAGED
        found.append((path, sequence))
    return sorted(found, key=lambda entry: (entry[1], entry[0].name), reverse=True)


def saved_iterations(folder: Path) -> list[int]:
    """Return the zero-based iterations of the periodic checkpoint folders, newest first."""
    named = (path.name.removeprefix("model_") for path in folder.glob("model_*") if path.is_dir())
    return sorted((int(number) for number in named if number.isdigit()), reverse=True)


def clear_leftovers(folder: Path) -> None:
    """Put right what saves that were killed have left; nobody else may be saving.

    Raises:
        OSError: it can not be done.
    """
    for path in folder.glob(BEING_REPLACED.format("model_*")):
        target = path.with_name(path.name[1 : -len(".old")])
        if target.exists():
            remove(path)
        else:
            path.rename(target)
    for path in [*folder.glob(BEING_WRITTEN.format("model_*")), folder / ".last_checkpoint.rank_0.tmp"]:
        remove(path)
