"""The one way to a CSV file of paths: what is no such file is said in one sentence."""

import csv
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dinov2.errors import DatasetError


@contextmanager
def csv_lines(path: str | Path, *, errors: str = "strict") -> Iterator[Iterator[str]]:
    """Open a CSV file in UTF-8 and give its lines to read, for the readers of the module ``csv``.

    Args:
        path: the file; a byte order mark is passed over.
        errors: as for ``open``; with ``surrogateescape`` paths may hold bytes that are no text.

    Raises:
        DatasetError: the file is no UTF-8, no CSV, or holds a NUL byte, which no path can.
    """
    try:
        with Path(path).open(encoding="utf-8-sig", errors=errors, newline="") as file:
            yield _without_nul(file, path)
    except UnicodeDecodeError as error:
        raise DatasetError(f'"{path}" is no CSV file in UTF-8 ({error}): save it as one') from error
    except csv.Error as error:
        raise DatasetError(
            f'"{path}" is no CSV file ({error}): close the quotation marks in it, or save it as one'
        ) from error


def _without_nul(lines: Iterable[str], path: str | Path) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if "\0" in line:
            raise DatasetError(
                f'line {number} of "{path}" holds a NUL byte, which no path can: save the file as CSV in '
                "UTF-8, or correct the line"
            )
        yield line
