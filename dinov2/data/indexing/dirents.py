"""The fast way to a slide folder's tile numbers on Linux: the kernel's own records, as arrays.

``os.scandir`` makes two objects per file and takes and gives back Python's lock for each. Here the records
come in large pieces, while other threads run. In a large folder the numbers are taken out of them without an
object per file; in a small one, where that would not pay, record by record. It serves folders of regular
files whose tiles have one suffix; for any other it declines, and the general way is taken.
"""

import ctypes
import os
import re
import sys
import threading

import numpy as np

from dinov2.data.indexing.names import LARGEST_NUMBER, MOST_DIGITS, NOT_A_TILE, SUFFIXES, TileNames

# struct linux_dirent64: inode (8 bytes), offset (8), length of the record (2), kind (1), name, zeros up to a
# multiple of 8. So after a word with length, kind and five bytes of the name come whole words of the name.
_WORD = 8
_SIZE_AT = 16
_KIND_AT = 18
_NAME_AT = 19
_WORDS_BEFORE = 3  # the second word of the name is the fourth of the record
_IN_FIRST_WORD = 5
_REGULAR_FILE = 8
_DOTS_BYTES = 48  # "." and "..", which every folder has
_BUFFER_BYTES = 1 << 18
_FEWEST_BYTES = 16384  # below that it is faster to go record by record
# All endings of tiles' names of one suffix, each with the zero behind it.
_ENDINGS = {
    suffix.encode("ascii"): re.compile(rf"(?:(?:0|[1-9][0-9]*){re.escape(suffix)}\0)+".encode("ascii"))
    for suffix in SUFFIXES
}

_local = threading.local()


def _system_call():
    """Return the C library's ``getdents64``, None where there is none or its records look otherwise."""
    if sys.platform != "linux" or sys.byteorder != "little":
        return None
    function = getattr(ctypes.CDLL(None, use_errno=True), "getdents64", None)
    if function is not None:
        function.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)
        function.restype = ctypes.c_ssize_t
    return function


_getdents64 = _system_call()


def regular_tiles(path: str, slide: str) -> TileNames | None:
    """Return the tiles of a slide folder if it holds regular files alone, and its tiles have one suffix.

    Args:
        path: the slide folder.
        slide: its name.

    Returns:
        Its tiles and what is none; None if the folder is not such a one.

    Raises:
        OSError: the folder can not be read.
    """
    prefix = os.fsencode(f"{slide}_patch_")
    if _getdents64 is None:
        return None
    records = _read_records(path)
    if len(records) >= _FEWEST_BYTES and len(prefix) >= _IN_FIRST_WORD + _WORD:
        found = parse_records(records, prefix)
        if found is not None:
            return found
    return parse_one_by_one(records, prefix)


def _read_records(path: str) -> bytes:
    if not hasattr(_local, "buffer"):
        _local.buffer = ctypes.create_string_buffer(_BUFFER_BYTES)
    pieces = []
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        while (count := _getdents64(folder, _local.buffer, _BUFFER_BYTES)) > 0:
            pieces.append(ctypes.string_at(_local.buffer, count))
        if count < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), path)
    finally:
        os.close(folder)
    return b"".join(pieces)


def parse_one_by_one(records: bytes, prefix: bytes) -> TileNames | None:
    """Return the tiles of a folder's records, and the other files, as :func:`regular_tiles` does.

    Args:
        records: of ``getdents64``, one behind the other.
        prefix: of every tile's name.
    """
    kind = bytes((_REGULAR_FILE,))
    tile = kind + prefix
    to_number = _KIND_AT + len(tile)
    sizes = memoryview(records).cast("H")
    endings: list[bytes] = []
    others: list[bytes] = []
    at, end = 0, len(records)
    while at < end:
        if records.startswith(tile, at + _KIND_AT):
            begin = at + to_number
            endings.append(records[begin : records.index(0, begin) + 1])
        else:
            name = records[at + _NAME_AT : records.index(0, at + _NAME_AT)]
            if records.startswith(kind, at + _KIND_AT):
                others.append(name)
            elif name not in (b".", b".."):
                return None
        at += sizes[(at + _SIZE_AT) // 2]
    joined = b"".join(endings)
    suffix = next((suffix for suffix, all_such in _ENDINGS.items() if all_such.fullmatch(joined)), None)
    if suffix is None:
        return None
    numbers = sorted(map(int, joined.replace(suffix, b"").split(b"\0")[:-1]))
    if numbers[-1] > LARGEST_NUMBER:
        return None
    skipped = sorted((os.fsdecode(name), NOT_A_TILE) for name in others)
    return TileNames(suffix.decode("ascii"), np.array(numbers, dtype=np.uint32), skipped)


def parse_records(records: bytes, prefix: bytes) -> TileNames | None:
    """Return the tiles of a folder's records if all are tiles of one suffix, else None.

    Args:
        records: of ``getdents64``, one behind the other.
        prefix: of every tile's name, at least 13 bytes.
    """
    begins = _records_of_files(records, prefix)
    if begins is None:
        return None
    # What of the prefix does not fill a word, digits, suffix and closing zero; further bytes are padding.
    rest = (len(prefix) - _IN_FIRST_WORD) % _WORD
    width = rest + MOST_DIGITS + max(map(len, SUFFIXES)) + 1
    padded = np.frombuffer(records + bytes(width), dtype=np.uint8)
    endings = padded[(begins + _NAME_AT + len(prefix) - rest)[:, None] + np.arange(width)]
    if rest and np.any(endings[:, :rest] != np.frombuffer(prefix[-rest:], dtype=np.uint8)):
        return None
    characters = np.ascontiguousarray(endings[:, rest:])
    lengths = (characters == ord(".")).argmax(axis=1)
    suffix = _common_suffix(characters, lengths)
    numbers = None if suffix is None else _numbers(characters, lengths)
    return None if numbers is None else TileNames(suffix, numbers, [])


def _records_of_files(records: bytes, prefix: bytes) -> np.ndarray | None:
    """Return where the records begin if, by whole words, all but the two dots are files with the prefix."""
    words = np.frombuffer(records, dtype="<u8")
    second = int.from_bytes(prefix[_IN_FIRST_WORD : _IN_FIRST_WORD + _WORD], "little")
    found = np.flatnonzero(words == second)
    if not len(found) or found[0] < _WORDS_BEFORE:
        return None
    for place in range(_IN_FIRST_WORD + _WORD, len(prefix) - _WORD + 1, _WORD):
        other = int.from_bytes(prefix[place : place + _WORD], "little")
        further = found + (place - _IN_FIRST_WORD) // _WORD
        if further[-1] >= len(words) or np.any(words[further] != other):
            return None
    first = words[found - 1]
    kind_and_name = int.from_bytes(bytes([_REGULAR_FILE]) + prefix[:_IN_FIRST_WORD], "little")
    if np.any(first >> np.uint64(16) != kind_and_name):
        return None
    begins = (found - _WORDS_BEFORE) * _WORD
    sizes = (first & np.uint64(0xFFFF)).astype(np.int64)
    # Were a record missing here, or found within the name of another, the lengths would not add up.
    complete = int(sizes.sum()) + _DOTS_BYTES == len(records)
    apart = bool(np.all(begins[1:] >= begins[:-1] + sizes[:-1]))
    return begins if complete and apart else None


def _common_suffix(characters: np.ndarray, lengths: np.ndarray) -> str | None:
    """Return the suffix that follows each row's digits, None if they differ or none is known."""
    starts = np.arange(len(lengths)) * characters.shape[1] + lengths
    for suffix in SUFFIXES:
        ending = np.frombuffer(f"{suffix}\0".encode("ascii"), dtype=np.uint8)
        if int(lengths.max()) + len(ending) > characters.shape[1]:
            return None
        if np.all(characters.ravel()[starts[:, None] + np.arange(len(ending))] == ending):
            return suffix
    return None


def _numbers(characters: np.ndarray, lengths: np.ndarray) -> np.ndarray | None:
    """Return the sorted numbers, uint32, None if one is not written as a tile's name has it."""
    longest = int(lengths.max())
    if lengths.min() < 1 or longest > MOST_DIGITS:
        return None
    digits = characters[:, :longest] - np.uint8(ord("0"))  # what is no digit wraps to above 9
    digits[np.arange(longest) >= lengths[:, None]] = 0
    if digits.max() > 9 or np.any((digits[:, 0] == 0) & (lengths > 1)):
        return None
    # Read as if all had as many digits as the longest, and then without the zeros that this adds.
    numbers = digits @ 10 ** np.arange(longest - 1, -1, -1) // 10 ** (longest - lengths)
    numbers.sort()
    return None if numbers[-1] > LARGEST_NUMBER else numbers.astype(np.uint32)
