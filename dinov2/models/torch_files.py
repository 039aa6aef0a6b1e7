"""Files written by ``torch.save``, read without running what they contain.

PyTorch's restricted unpickler refuses every class that it does not know. DINO and iBOT store their options
and a few NumPy numbers beside the weights; for these it is given stand-ins, none of which executes anything.
"""

import argparse
import io
import pickle
import re
import struct
import threading
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from dinov2.errors import WeightsError
from dinov2.models.integrity import CHUNK_BYTES, damaged
from dinov2.models.pickle_scan import check_pickle

NUMBER_FORMATS = {  # NumPy's code of a number -> the struct module's
    "b1": "?",
    **{"i1": "b", "i2": "h", "i4": "i", "i8": "q"},
    **{"u1": "B", "u2": "H", "u4": "I", "u8": "Q"},
    **{"f2": "e", "f4": "f", "f8": "d"},
}


class _NumberType:
    """Stands for ``numpy.dtype``: the type of one number, and nothing that NumPy would act on."""

    def __init__(self, code: str, *unused: Any) -> None:
        if not isinstance(code, str) or code not in NUMBER_FORMATS:
            raise pickle.UnpicklingError(f"Unsupported global: GLOBAL numpy.dtype({code!r})")
        self.code, self.order = code, "<"

    def __setstate__(self, state: tuple) -> None:
        self.order = ">" if state[1] == ">" else "<"


def _number(kind: _NumberType, data: bytes) -> float | int | bool:
    """Stand for NumPy's constructor of scalars: the same value as a number of Python."""
    if not isinstance(kind, _NumberType):
        raise pickle.UnpicklingError(f"a number is of the unknown type {type(kind).__name__}")
    return struct.unpack(kind.order + NUMBER_FORMATS[kind.code], data)[0]


LEGACY_PICKLES = 5  # magic number, version, facts about the machine, content, order of the storages

# With a name of their own these entries are not confused with what a user has declared safe.
STAND_INS = [
    (argparse.Namespace, "argparse.Namespace"),
    (_NumberType, "numpy.dtype"),
    (_number, "numpy.core.multiarray.scalar"),
    (_number, "numpy._core.multiarray.scalar"),
]
_unpickling = threading.Lock()  # torch keeps the list of stand-ins in one place for all threads


def read_archive(path: Path, size: int) -> Any:
    """Return what a file in PyTorch's zip format holds, its tensors mapped from the file."""
    _check_archive(path, size)
    return _load(path, _pickles_of_archive(path), mmap=True)


def read_legacy(path: Path) -> Any:
    """Return what a file in the format before PyTorch 1.6 holds."""
    return _load(path, _pickles_of_legacy(path), mmap=False)


def _pickles_of_archive(path: Path) -> Iterator[BinaryIO]:
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            if record.filename.lower().endswith("data.pkl"):  # PyTorch's reader may overlook the case
                record.CRC = record.CRC or None  # zero is no checksum; those there are have been compared
                yield io.BytesIO(archive.read(record))


def _pickles_of_legacy(path: Path) -> Iterator[BinaryIO]:
    with path.open("rb") as stream:
        for _ in range(LEGACY_PICKLES):
            if stream.peek(1):  # that one is lacking is for PyTorch to say
                yield stream


def _load(path: Path, pickles: Iterable[BinaryIO], *, mmap: bool) -> Any:
    try:
        for stream in pickles:
            check_pickle(stream)
        with _unpickling, torch.serialization.safe_globals(STAND_INS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        found = re.search(r"(?i:unsupported global: GLOBAL|unsupported GLOBAL|GLOBAL) (\S+)", str(error))
        if found is None:
            raise damaged(path, error) from error
        raise WeightsError(
            f'The weight file "{path}" contains the Python object {found[1]}, and loading it could run code '
            "or fill the memory: it is not loaded; if you trust its origin, save its tensors alone to a new "
            "file with torch.save."
        ) from error
    except Exception as error:  # the restricted unpickler meets damaged input with almost any exception
        raise damaged(path, error) from error


def _check_archive(path: Path, size: int) -> None:
    """Refuse an archive that is cut off, altered, larger inside than outside, or not PyTorch's.

    ``torch.load`` compares no checksums: without this a flipped bit becomes a wrong weight.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            problem = _problem(records, size)
            # A checksum is zero where torch.serialization.set_crc32_options(False) was in force.
            for record in () if problem else filter(lambda record: record.CRC, records):
                with archive.open(record) as stream:
                    while stream.read(CHUNK_BYTES):
                        pass
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        raise damaged(path, error) from error
    if problem:
        raise WeightsError(f'The weight file "{path}" {problem}.')


def _problem(records: list[zipfile.ZipInfo], size: int) -> str | None:
    """Return why an archive with these records is not read, if its table of contents tells."""
    names = {record.filename.rpartition("/")[2] for record in records}
    if "constants.pkl" in names:
        return "is a TorchScript program: save its state_dict() with torch.save and give that file"
    if any(name.endswith("archive_format") or name == "model.json" for name in names):
        return "is a graph of torch.export: name the weights that it was exported from"
    if "data.pkl" not in names:
        return "is a zip archive, but not of PyTorch: unpack it and name the weight file inside"
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        return "is an archive with compressed records, which torch.save never writes: it is not loaded"
    if sum(record.file_size for record in records) > size:
        return "is an archive whose records claim more bytes than it has: download or copy it again"
    return None
