"""The file ``evaluation_metrics.json``: one JSON object a line, one line per evaluation in the loop."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dinov2.errors import OutputError
from dinov2.logging.helpers import append_line
from dinov2.utils.strict_json import to_json

RECORDS_FILE = "evaluation_metrics.json"
START_FILE = "evaluation_start.npz"  # the teacher's features of the monitored images at iteration 0


@dataclass(frozen=True)
class Record:
    """What one evaluation in the loop has found.

    Attributes:
        iteration: iterations done; 0 is the starting backbone.
        signals: by name; one that is not defined is NaN.
        intervals: 95 % intervals ``(low, high)`` of some of the signals.
        collapse: one clause per reason to call the features collapsed; none if they are not.
        images: checksum of the images and labels they come from; records of others are not comparable.
    """

    iteration: int
    signals: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    collapse: tuple[str, ...] = ()
    images: str = ""

    def line(self) -> str:
        """Return the record as a line of the file."""
        content = {
            "iteration": self.iteration,
            "signals": dict(self.signals),
            "intervals": {name: list(ends) for name, ends in self.intervals.items()},
            "collapse": list(self.collapse),
            "images": self.images,
        }
        return to_json(content) + "\n"


def read_records(path: Path) -> list[Record]:
    """Read the file, in its order; a line that a kill cut short is left out, no file means no records."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text("utf-8").splitlines():
        try:
            content = json.loads(line)
        except ValueError:
            continue
        records.append(
            Record(
                content["iteration"],
                {name: _number(value) for name, value in content["signals"].items()},
                {name: tuple(map(_number, ends)) for name, ends in content["intervals"].items()},
                tuple(content["collapse"]),
                content.get("images", ""),
            )
        )
    return records


def append_record(path: Path, record: Record) -> None:
    """Add a line; call on the main process only.

    Raises:
        OutputError: the file cannot be written.
    """
    try:
        append_line(path, record.line().encode())
    except OSError as error:
        raise OutputError(f"the evaluation file {path} cannot be written ({error.strerror})") from error


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)
