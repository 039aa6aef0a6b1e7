"""The JSON file in which a benchmark leaves what it measured."""

from pathlib import Path
from typing import Any

from dinov2.errors import OutputError
from dinov2.utils.strict_json import to_json


def check_report(path: Path | None) -> None:
    """Find out, before anything is timed, whether a report can be written.

    Raises:
        OutputError: it can not.
    """
    if path is None:
        return
    is_new = not path.exists()
    try:
        path.open("a").close()
    except OSError as error:
        raise OutputError(
            f"--output {path} can not be written ({error.strerror}): name a file in a folder that exists"
        ) from error
    if is_new:
        path.unlink()


def write_report(path: Path | None, report: dict[str, Any]) -> None:
    """Write a report if there is a file to write to; numbers that are not finite, as null."""
    if path is not None:
        path.write_text(to_json(report, indent=2, default=str) + "\n")
