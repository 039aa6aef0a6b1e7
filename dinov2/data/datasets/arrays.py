"""Index arrays on disk and compact lists of strings, both cheap to hand to worker processes."""

import errno
import glob
import mmap
import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from dinov2.errors import DatasetError, OutputError


class IndexArray:
    """An ``.npy`` file, memory-mapped at first use and again in every process that gets a copy.

    A copy refuses a file that was replaced after the original had been mapped: its rows mean something else.

    Args:
        path: the file.
        how_to_build: end of the sentence that is shown when it is missing.
        fields: names of the columns it must have.
    """

    def __init__(self, path: str, how_to_build: str, fields: tuple[str, ...] = ()) -> None:
        self.path = path
        self._how_to_build = how_to_build
        self._fields = fields
        self._array: np.ndarray | None = None
        self._mapped: tuple[int, int, int] | None = None  # which file it is, travels with the copies

    def __getstate__(self) -> dict:
        # A memory map would be pickled as its whole content.
        return {**self.__dict__, "_array": None}

    def get(self) -> np.ndarray:
        """Return the array.

        Raises:
            DatasetError: the file is missing, empty, of another kind, lacks a column, or is not the one that
                was mapped before.
        """
        if self._array is None:
            found = self._identity()
            array = self._load()
            self._mapped = self._mapped or found
            self.require_unchanged()
            self._array = array
        return self._array

    def require_unchanged(self) -> None:
        """Compare the file on disk with the one that was mapped.

        Raises:
            DatasetError: it is another one, or has been written to.
        """
        if self._identity() != self._mapped:
            raise DatasetError(f'the index "{self.path}" was rebuilt since this run opened it: start again')

    def _identity(self) -> tuple[int, int, int] | None:
        try:
            status = Path(self.path).stat()
        except OSError:  # loading it finds the words
            return None
        return status.st_ino, status.st_size, status.st_mtime_ns

    def _load(self) -> np.ndarray:
        try:
            array = np.load(self.path, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError as error:
            raise DatasetError(f'the index "{self.path}" is missing: {self._how_to_build}') from error
        except (ValueError, OSError, EOFError) as error:
            raise DatasetError(
                f'the index "{self.path}" is empty or can not be read ({error}): {self._how_to_build}'
            ) from error
        missing = set(self._fields) - set(array.dtype.names or ())
        if missing:
            raise DatasetError(
                f'the index "{self.path}" lacks {", ".join(sorted(missing))}: {self._how_to_build}'
            )
        if hasattr(mmap, "MADV_RANDOM") and isinstance(array, np.memmap):
            # Rows are read here and there: reading ahead would fetch most of a large index from the disk.
            array._mmap.madvise(mmap.MADV_RANDOM)
        return array

    def drop(self) -> None:
        """Forget the mapped content, because the file has been written anew."""
        self._array = self._mapped = None


class PackedStrings:
    """Many strings in two arrays: no Python object per string, nothing for forked workers to copy.

    Args:
        strings: file names or paths; undecodable bytes survive.
    """

    def __init__(self, strings: Iterable[str]) -> None:
        encoded = [os.fsencode(string) for string in strings]
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self._ends = np.cumsum([len(item) for item in encoded], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        index = range(len(self._ends))[index]
        begin = int(self._ends[index - 1]) if index else 0
        return os.fsdecode(self._bytes[begin : int(self._ends[index])].tobytes())


@contextmanager
def writing(path: str) -> Iterator[None]:
    """Say in one sentence that a file can not be written, whatever the file system's reason.

    Raises:
        OutputError: in place of any other ``OSError``.
    """
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = "free some space" if full else "name a folder that can be written"
        raise OutputError(f'can not write "{path}" ({error}): {advice}') from error


@contextmanager
def atomic_file(path: str) -> Iterator[BinaryIO]:
    """Open a file to write that takes its name only when it is complete; readers never see a part.

    Raises:
        OutputError: the folder can not be written, or has no space left.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    with writing(path):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)


def remove_leftovers(path: str) -> None:
    """Remove what an :func:`atomic_file` of that path left behind when its process was killed.

    Args:
        path: of the file, or its beginning up to a dot, for all files that begin so. Nobody may write them.
    """
    target = Path(path)
    for leftover in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):
        leftover.unlink(missing_ok=True)


def save_array(path: str, array: np.ndarray) -> None:
    """Write an array as ``.npy``, see :func:`atomic_file`."""
    with atomic_file(path) as file:
        np.save(file, array, allow_pickle=False)
