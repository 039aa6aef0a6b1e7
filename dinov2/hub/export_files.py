"""Writing exported files: complete or not at all, and never over others by accident."""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov2.errors import OutputError
from dinov2.models.digest import DIGEST_KEY, tensors_digest


def write_aside(
    folder: Path, names: Iterable[str], write: Callable[[Path], None], *, force: bool = False
) -> list[Path]:
    """Let ``write`` fill a folder beside ``folder``, then move its files into place.

    A kill leaves every file as it was or as it is to be; a new folder appears with all its files at once.

    Args:
        folder: Where the files belong; made if need be, with its parents.
        names: The files that may be there already and would be replaced.
        write: Is given the folder to write into.
        force: Replace files that exist.

    Returns:
        The files in place.

    Raises:
        OutputError: A file exists and ``force`` is not given, or the disk is full or not writable.
    """
    existing = [name for name in names if (folder / name).exists()]
    if existing and not force:
        raise OutputError(
            f"{folder / existing[0]} exists already: choose another --output, or add --force to replace it."
        )
    aside = folder if folder.exists() else folder.parent  # a rename needs the same file system
    aside = aside / f".{folder.name}.{os.getpid()}.tmp"
    try:
        aside.mkdir(parents=True)
        try:
            write(aside)
            return _move(aside, folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(
            f"{folder} cannot be written to ({error.strerror or error}): free some space, check the "
            "permissions or choose another --output."
        ) from error


def _move(aside: Path, folder: Path) -> list[Path]:
    names = sorted(path.name for path in aside.iterdir())
    for name in names:
        (aside / name).chmod(_new_file_mode())  # safetensors are written readable by their owner alone
        with (aside / name).open("rb") as file:
            os.fsync(file.fileno())
    if folder.exists():
        for name in names:
            (aside / name).replace(folder / name)
    else:
        aside.replace(folder)
    return [folder / name for name in names]


def _new_file_mode() -> int:
    mask = os.umask(0)  # can only be read by setting it
    os.umask(mask)
    return 0o666 & ~mask


def write_pickle(state: Mapping[str, Tensor], path: Path) -> None:
    """Write a state dict with ``torch.save``, as DINOv2 releases them."""
    with path.open("wb") as file:
        try:
            torch.save(dict(state), file)
        except RuntimeError as error:  # how torch.save reports a full disk
            raise OSError(str(error).partition("\n")[0]) from error


def write_safetensors(state: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors as safetensors, with their digest in the metadata."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    separate = {name: _own_memory(tensor.detach()) for name, tensor in state.items()}
    metadata = {"format": "pt", DIGEST_KEY: tensors_digest(sorted(separate.items()))}
    try:
        save_file(separate, path, metadata=metadata)
    except SafetensorError as error:
        raise OSError(str(error)) from error


def _own_memory(tensor: Tensor) -> Tensor:
    """Copy rows of a larger tensor: the format does not allow tensors that share memory."""
    shares = tensor.untyped_storage().nbytes() != tensor.nbytes
    return tensor.clone(memory_format=torch.contiguous_format) if shares else tensor.contiguous()


def write_json(content: Mapping[str, Any], path: Path) -> None:
    """Write a JSON file for people and programs to read."""
    path.write_text(json.dumps(content, indent=2) + "\n")
