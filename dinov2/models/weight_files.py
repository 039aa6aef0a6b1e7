"""From what a user names (a path, a folder, an address) to the dictionary inside the file, safely.

Nothing here executes what a file contains: pickles are read with PyTorch's restricted unpickler, and records
of an archive are compared with their stored checksums before any of them is used.
"""

import pickle
import re
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dinov2.errors import WeightsError
from dinov2.models.downloads import CHUNK_BYTES, REMOTE_SCHEMES, fetch

WEIGHT_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")
ACCEPTED_SOURCES = (
    "a path to a .pth, .pt or .safetensors file, a folder with one, or a file:, http: or https: address"
)


def locate(source: str, *, entry: str | None = None) -> Path:
    """Return the local file that ``source`` names, downloading it if it is an address.

    Args:
        source: Path, folder or address.
        entry: ``teacher`` or ``student``: which of a folder's checkpoints is meant (default teacher).

    Raises:
        WeightsError: There is no such file.
    """
    source = str(source)
    address = urllib.parse.urlsplit(source)
    if address.scheme in REMOTE_SCHEMES:
        return fetch(source)
    if address.scheme == "file":
        path = Path(urllib.request.url2pathname(address.path))
    elif "://" in source:
        raise WeightsError(f'Cannot load weights from "{source}": accepted is {ACCEPTED_SOURCES}.')
    else:
        path = Path(source).expanduser()
    if path.is_dir():
        return _file_in_folder(path, entry or "teacher")
    if not path.is_file():
        raise WeightsError(f'The weight file "{source}" does not exist: accepted is {ACCEPTED_SOURCES}.')
    return path


def _file_in_folder(folder: Path, entry: str) -> Path:
    """Return ``{entry}_checkpoint.pth`` of a training output, or else the only weight file of the folder."""
    exported = folder / f"{entry}_checkpoint.pth"
    if exported.is_file():
        return exported
    candidates = sorted(path for path in folder.iterdir() if path.suffix in WEIGHT_SUFFIXES)
    if len(candidates) == 1:
        return candidates[0]
    found = ", ".join(path.name for path in candidates[:5]) or "no weight file at all"
    raise WeightsError(
        f'The folder "{folder}" has no {exported.name} and not exactly one weight file, but {found}: '
        "name the file to load."
    )


def read_file(path: Path) -> dict[str, Any]:
    """Return the dictionary stored in a weight file, with all tensors on the CPU.

    Tensors of a ``.pth`` archive and of safetensors are mapped from the file, not copied.

    Raises:
        WeightsError: The file is unreadable, damaged, no weight file, or would execute code when loaded.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            head = stream.read(512)
    except OSError as error:
        raise WeightsError(f'The weight file "{path}" cannot be read ({error.strerror}).') from error
    if head.startswith(b"PK\x03\x04"):
        _check_archive(path, size)
        content = _read_pickle(path, mmap=True)
    elif head.startswith(b"\x80"):
        content = _read_pickle(path, mmap=False)
    elif path.suffix == ".safetensors" or head[8:9] == b"{":
        content = _read_safetensors(path)
    else:
        raise WeightsError(f'The weight file "{path}" {_what_it_is(head)}: download or copy it again.')
    if not isinstance(content, Mapping):
        raise WeightsError(
            f'The weight file "{path}" holds a {type(content).__name__}: expected a dictionary of tensors.'
        )
    return dict(content)


def _what_it_is(head: bytes) -> str:
    if not head:
        return "is empty"
    if head.lstrip().startswith(b"<"):
        return "is a web page saved under this name"
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file it points to"
    return f"is neither a PyTorch nor a safetensors file (it starts with {head[:8]!r})"


def _check_archive(path: Path, size: int) -> None:
    """Refuse an archive that is cut off, altered, or larger inside than outside.

    ``torch.load`` compares no checksums: without this a flipped bit becomes a wrong weight.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            stored = all(record.compress_type == zipfile.ZIP_STORED for record in records)
            inflated = not stored or sum(record.file_size for record in records) > size
            # A checksum is zero where torch.serialization.set_crc32_options(False) was in force.
            for record in () if inflated else filter(lambda record: record.CRC, records):
                with archive.open(record) as stream:
                    while stream.read(CHUNK_BYTES):
                        pass
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        raise _damaged(path, error) from error
    if inflated:
        raise WeightsError(
            f'The weight file "{path}" is an archive with compressed records, which torch.save never writes: '
            "it is not loaded."
        )


def _read_pickle(path: Path, *, mmap: bool) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        found = re.search(r"(?i:unsupported global: GLOBAL|unsupported GLOBAL|GLOBAL) (\S+)", str(error))
        if found is None:
            raise _damaged(path, error) from error
        raise WeightsError(
            f'The weight file "{path}" contains the Python object {found[1]}, and loading it could run code: '
            "it is not loaded; if you trust its origin, save its tensors alone to a new file with torch.save."
        ) from error
    except Exception as error:  # the restricted unpickler meets damaged input with almost any exception
        raise _damaged(path, error) from error


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> WeightsError:
    reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
    return WeightsError(
        f'The weight file "{path}" is cut off or damaged ({reason[:120]}): download or copy it again.'
    )
