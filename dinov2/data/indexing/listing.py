"""Listing one slide folder: what a worker of the index builder does."""

import os
import stat
import time
import zlib
from typing import NamedTuple

import numpy as np

from dinov2.data.indexing.dirents import regular_tiles
from dinov2.data.indexing.names import SUFFIXES, TileNames, parse_names, tile_name
from dinov2.data.indexing.verify import UnreadableError, check_file, covers

# A folder that changed this shortly before it was listed may change again within the same tick of the file
# system's clock, unseen; it is listed again next time.
SETTLED_SECONDS = 2.0

# As many numbers or fewer are kept as they are: to compress them takes longer than to list them.
FEW = 64

Signature = tuple[int, int, int]


class SlideRecord(NamedTuple):
    """What is known of an entry of a patches folder.

    Attributes:
        folder: the patches folder.
        slide: name of the entry.
        signature: of the slide folder when it was listed; None if it must be listed again next time.
        verify: how closely the files were looked at.
        suffix: of the tiles.
        count: number of tiles.
        packed: their numbers, see :attr:`numbers`.
        skipped: (file name, reason) of what is no tile; the name is empty for the entry itself.
    """

    folder: str
    slide: str
    signature: Signature | None
    verify: str
    suffix: str
    count: int
    packed: bytes
    skipped: list[tuple[str, str]]

    @property
    def numbers(self) -> np.ndarray:
        """Numbers of the tiles, sorted, uint32."""
        if not self.count:
            return np.empty(0, dtype=np.uint32)
        if self.count <= FEW:
            return np.frombuffer(self.packed, dtype="<u4").astype(np.uint32)
        steps = zlib.decompress(self.packed)
        return np.cumsum(np.frombuffer(steps, dtype=f"<u{len(steps) // self.count}"), dtype=np.uint32)


class Known(NamedTuple):
    """What an earlier build left about a slide, as far as a worker needs it."""

    signature: Signature
    verify: str


def list_slide(folder: str, slide: str, verify: str, known: Known | None) -> SlideRecord | None:
    """List, and where asked look into, the files of a slide.

    Returns:
        The record; None if what is known of the slide still holds.
    """
    path = f"{folder}/{slide}"
    try:
        status = os.stat(path)  # noqa: PTH116 - once per slide, before anything else is done with it
        if not stat.S_ISDIR(status.st_mode):
            return _without_tiles(folder, slide, verify, "it is no folder")
        signature = (status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
        if known is not None and known.signature == signature and covers(known.verify, verify):
            return None
        settled = time.time() - status.st_mtime > SETTLED_SECONDS
        suffix, numbers, skipped = regular_tiles(path, slide) or _any_tiles(path, slide)
    except OSError as error:
        return _without_tiles(folder, slide, verify, f"it can not be listed ({os.strerror(error.errno)})")
    if verify != "none":
        numbers, damaged, readable = _verified(path, slide, suffix, numbers, verify)
        skipped += damaged
        settled = settled and readable
    return SlideRecord(
        folder,
        slide,
        signature if settled else None,
        verify,
        suffix,
        len(numbers),
        _packed(numbers),
        skipped,
    )


def _packed(numbers: np.ndarray) -> bytes:
    """Return sorted numbers as bytes; many as their differences, the narrowest integers, and compressed."""
    if len(numbers) <= FEW:
        return numbers.astype("<u4").tobytes()
    steps = numbers.copy()
    steps[1:] -= numbers[:-1]
    narrow = np.min_scalar_type(steps.max()).newbyteorder("<")
    return zlib.compress(steps.astype(narrow).tobytes(), 1)


def _without_tiles(folder: str, slide: str, verify: str, reason: str) -> SlideRecord:
    return SlideRecord(folder, slide, None, verify, SUFFIXES[0], 0, b"", [("", reason)])


def _any_tiles(path: str, slide: str) -> TileNames:
    names, skipped = _file_names(path)
    suffix, numbers, others = parse_names(slide, names)
    return TileNames(suffix, numbers, skipped + others)


def _file_names(path: str) -> tuple[list[str], list[tuple[str, str]]]:
    """Return the names of the files in a folder, and (name, reason) of what is no file."""
    others: list[os.DirEntry] = []
    try:
        with os.scandir(path) as entries:
            # The hot loop: append returns None, so what is no file goes to the others alone.
            names = [entry.name for entry in entries if entry.is_file() or others.append(entry)]
    except OSError:  # of the folder, or one of its links can not be followed
        with os.scandir(path) as entries:
            found = list(entries)
        names = [entry.name for entry in found if not _why_no_file(entry)]
        others = [entry for entry in found if _why_no_file(entry)]
    return names, sorted((entry.name, _why_no_file(entry)) for entry in others)


def _why_no_file(entry: os.DirEntry) -> str:
    try:
        if entry.is_file():
            return ""
        if entry.is_dir():
            return "it is a folder"
        return "it is a link to nothing" if entry.is_symlink() else "it is neither file nor folder"
    except OSError as error:
        return f"it is a link that can not be followed ({os.strerror(error.errno)})"


def _verified(
    path: str, slide: str, suffix: str, numbers: np.ndarray, verify: str
) -> tuple[np.ndarray, list[tuple[str, str]], bool]:
    """Return the numbers of the sound tiles, (name, reason) of the others, and whether all could be read."""
    reasons: dict[int, str] = {}
    readable = True
    for number in numbers.tolist():
        try:
            reason = check_file(f"{path}/{tile_name(slide, number, suffix)}", verify)
        except UnreadableError as error:
            reason, readable = str(error), False
        if reason:
            reasons[number] = reason
    sound = numbers[~np.isin(numbers, list(reasons))] if reasons else numbers
    return sound, [(tile_name(slide, number, suffix), reasons[number]) for number in reasons], readable
