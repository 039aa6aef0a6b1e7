"""The JSON file in which a benchmark leaves what it measured."""

import json
import math
from pathlib import Path
from typing import Any

from dinov2.errors import OutputError


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
        path.write_text(json.dumps(_finite(report), indent=2, allow_nan=False, default=str) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
