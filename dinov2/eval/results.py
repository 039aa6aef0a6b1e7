"""Files that hold the results of an evaluation."""

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dinov2 import distributed
from dinov2.errors import OutputError

logger = logging.getLogger("dinov2")


def percent(accuracy: Tensor) -> float | list[float]:
    """Return an accuracy, or a list of one per class, in percent."""
    return (100.0 * accuracy.double()).tolist()


def to_json(value: Any, indent: int | None = None) -> str:
    """Return ``value`` as JSON; what is not a number (the recall of a class without samples) is null."""
    return json.dumps(_without_nan(value), indent=indent, allow_nan=False)


def append_lines(path: str | Path, lines: list[str]) -> None:
    """Append lines to a result file; only the main process writes."""
    if not distributed.is_main_process():
        return
    try:
        with Path(path).open("a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)
    except OSError as error:
        raise _unwritable(path, error) from error


def write_summary(output_dir: str, evaluation: str, summary: Mapping[str, Any]) -> None:
    """Write ``results_eval_<evaluation>_summary.json``, one JSON document; only the main process writes.

    An earlier summary is replaced.
    """
    if not distributed.is_main_process():
        return
    path = Path(output_dir) / f"results_eval_{evaluation}_summary.json"
    text = to_json({"evaluation": evaluation, **summary}, indent=2)
    aside = path.with_suffix(".json.tmp")
    try:
        aside.write_text(text + "\n", encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        raise _unwritable(path, error) from error
    logger.info("results are in %s", path)


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _unwritable(path: str | Path, error: OSError) -> OutputError:
    return OutputError(
        f"the result file {path} cannot be written ({error.strerror}): choose another --output-dir"
    )
