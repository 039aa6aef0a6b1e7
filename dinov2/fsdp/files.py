"""Reading and writing single checkpoint files: whole or not at all, and never running foreign code."""

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from dinov2.errors import OutputError, WeightsError

# Everything that damaged, foreign and unsafe files were seen to raise.
UNREADABLE = (
    OSError,
    EOFError,
    RuntimeError,
    KeyError,
    ValueError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
)


def temporary_name(path: Path) -> Path:
    """Return the name under which ``path`` is written until it is complete."""
    return path.with_name(f".{path.name}.tmp")


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write aside, force the bytes to the disk, then rename: a kill leaves the old file or the new one.

    Raises:
        OutputError: The disk is full or the folder cannot be written.
    """
    aside = temporary_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with aside.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        raise OutputError(
            f"{path} cannot be written ({_one_line(error)}): free some space, check the permissions or "
            "choose another --output-dir"
        ) from error


def read(path: Path) -> dict[str, Any]:
    """Read a file of tensors and plain values onto the CPU.

    Raises:
        WeightsError: The file is absent, is damaged, or holds anything else.
    """
    if not path.is_file():
        raise WeightsError(f"the checkpoint {path} does not exist: check the path")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise WeightsError(
            f"the checkpoint {path} cannot be read: it is damaged, or holds objects other than tensors and "
            f"plain values, which are refused because loading them could run code ({_one_line(error)})"
        ) from error
    if not isinstance(state, dict):
        raise WeightsError(f"the checkpoint {path} holds a {type(state).__name__}, not the state of a run")
    return state


def read_verified(path: Path) -> dict[str, Any]:
    """Read like :func:`read` after comparing all checksums, which PyTorch stores but does not look at.

    Raises:
        WeightsError: As for :func:`read`, or a byte of the file has changed.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except UNREADABLE as error:
        raise WeightsError(f"the checkpoint {path} is damaged or incomplete ({_one_line(error)})") from error
    if damaged is not None:
        raise WeightsError(f"the checkpoint {path} is damaged (the checksum of {damaged} does not match)")
    return read(path)


def _one_line(error: Exception) -> str:
    """The start of a message without its line breaks; some exceptions only have a type."""
    return " ".join(str(error).split())[:200] or type(error).__name__
