"""Remembers every slide that was listed, so that a build after one that was killed need not do so again.

A text file: a header line, then lines of some slides each, with a checksum. A line that was cut off is passed
over, and so is what a later line lists again.
"""

import base64
import json
import logging
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from dinov2.data.datasets.arrays import atomic_file, writing
from dinov2.data.indexing.listing import SlideRecord

logger = logging.getLogger("dinov2")

_PER_LINE = 256  # of a journal that is written anew

HEADER = b"dinov2 tile index journal 2\n"

Records = dict[tuple[str, str], SlideRecord]


class Journal:
    """The journal of one index; use it as a context manager to append to it.

    Args:
        path: the file; need not exist.

    Raises:
        OutputError: (on writing) the file can not be written.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._file: BinaryIO | None = None
        self._count = 0  # of records in the file, with those that are out of date

    def __enter__(self) -> "Journal":
        with writing(self.path):
            self._file = Path(self.path).open("ab")
            if not self._file.tell():
                self._file.write(HEADER)
        return self

    def __exit__(self, *unused: object) -> None:
        with writing(self.path):
            self._file.close()

    def read(self) -> Records:
        """Return the latest record of every slide, and cut off a line that is not complete."""
        if not Path(self.path).is_file():
            return {}
        records: Records = {}
        with Path(self.path).open("rb") as file:
            if file.readline() != HEADER:
                logger.warning('"%s" is no journal of this version and is started anew', self.path)
                self.clear()
                return {}
            whole = file.tell()
            for line in file:
                if not line.endswith(b"\n"):
                    break
                whole += len(line)
                found = _decode(line)
                self._count += max(1, len(found))  # a damaged line counts, so that it does not stay
                records.update({(record.folder, record.slide): record for record in found})
        with writing(self.path), Path(self.path).open("r+b") as file:
            file.truncate(whole)
        return records

    def clear(self) -> None:
        """Forget everything."""
        with writing(self.path):
            Path(self.path).unlink(missing_ok=True)
        self._count = 0

    def append(self, records: Sequence[SlideRecord]) -> None:
        """Add what was found of some slides."""
        if not records:
            return
        with writing(self.path):
            self._file.write(_encode(records))
            self._file.flush()  # to the system, so that it outlives this process
        self._count += len(records)

    def compact(self, records: Sequence[SlideRecord]) -> None:
        """Leave only these records, if there are others; call it when the journal is not open."""
        if self._count == len(records):
            return
        with atomic_file(self.path) as file:
            file.write(HEADER)
            file.writelines(
                _encode(records[begin : begin + _PER_LINE]) for begin in range(0, len(records), _PER_LINE)
            )
        self._count = len(records)


def _encode(records: Sequence[SlideRecord]) -> bytes:
    fields = [
        (*record[:6], base64.b64encode(record.packed).decode("ascii"), record.skipped) for record in records
    ]
    text = json.dumps(fields, separators=(",", ":")).encode("ascii")
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _decode(line: bytes) -> list[SlideRecord]:
    """Return the records of a line, none if the line is damaged."""
    checksum, _, text = line.rstrip(b"\n").partition(b" ")
    if checksum != b"%08x" % zlib.crc32(text):
        return []
    return [
        SlideRecord(
            folder,
            slide,
            None if signature is None else tuple(signature),
            *fields,
            base64.b64decode(packed),
            [tuple(item) for item in skipped],
        )
        for folder, slide, signature, *fields, packed, skipped in json.loads(text)
    ]
