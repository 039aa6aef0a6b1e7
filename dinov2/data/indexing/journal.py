"""Remembers every slide that was listed, so that a build after one that was killed need not do so again.

A text file: a header line, then a line per slide, each with a checksum. A line that was cut off or belongs to
an older listing of its slide is passed over.
"""

import base64
import json
import logging
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from dinov2.data.datasets.arrays import atomic_file, writing
from dinov2.data.indexing.listing import SlideRecord

logger = logging.getLogger("dinov2")

HEADER = b"dinov2 tile index journal 1\n"

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
        self._lines = 0  # in the file, with those that are out of date

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
                self._lines += 1
                record = _decode(line)
                if record is not None:
                    records[record.folder, record.slide] = record
        with writing(self.path), Path(self.path).open("r+b") as file:
            file.truncate(whole)
        return records

    def clear(self) -> None:
        """Forget everything."""
        with writing(self.path):
            Path(self.path).unlink(missing_ok=True)
        self._lines = 0

    def append(self, record: SlideRecord) -> None:
        """Add what was found of a slide."""
        with writing(self.path):
            self._file.write(_encode(record))
            self._file.flush()  # to the system, so that it outlives this process
        self._lines += 1

    def compact(self, records: Iterable[SlideRecord], count: int) -> None:
        """Leave only these records, if there are others; call it when the journal is not open."""
        if self._lines == count:
            return
        with atomic_file(self.path) as file:
            file.write(HEADER)
            file.writelines(_encode(record) for record in records)
        self._lines = count


def _encode(record: SlideRecord) -> bytes:
    fields = [*record[:6], base64.b64encode(record.packed).decode("ascii"), record.skipped]
    text = json.dumps(fields, separators=(",", ":")).encode("ascii")
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _decode(line: bytes) -> SlideRecord | None:
    """Return the record of a line, None if the line is damaged."""
    checksum, _, text = line.rstrip(b"\n").partition(b" ")
    if checksum != b"%08x" % zlib.crc32(text):
        return None
    *fields, packed, skipped = json.loads(text)
    record = SlideRecord(*fields, base64.b64decode(packed), [tuple(item) for item in skipped])
    return record._replace(signature=None if record.signature is None else tuple(record.signature))
