"""The record of a self-check: its lines, how they are shown and stored, and what follows from them."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from dinov2.errors import UserError
from dinov2.fsdp.files import write_atomically
from dinov2.utils.strict_json import to_json

logger = logging.getLogger("dinov2")

FILE_NAME = "self_check.json"
Status = Literal["ok", "note", "wrong"]
SEVERITY = ("ok", "note", "wrong")


class SelfCheckError(UserError, ValueError):
    """The run would not do what its config says."""


@dataclass(frozen=True)
class Line:
    """One finding: what was looked at, the verdict, a sentence, and the values behind it."""

    name: str
    status: Status
    text: str
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SelfCheck:
    """All findings about one start of a run."""

    lines: Sequence[Line]

    @property
    def wrong(self) -> list[Line]:
        """The lines that should stop the run."""
        return self.of("wrong")

    def of(self, status: Status) -> list[Line]:
        """Return the lines of one verdict."""
        return [line for line in self.lines if line.status == status]

    def table(self) -> str:
        """Return the lines as an aligned table under a heading that counts them."""
        width = max((len(line.name) for line in self.lines), default=0)
        counts = ", ".join(f"{len(self.of(status))} {status}" for status in SEVERITY)
        rows = [f"  {line.status:<5}  {line.name:<{width}}  {line.text}" for line in self.lines]
        return "\n".join([f"self-check before the first step: {counts} ({FILE_NAME} has the values)", *rows])

    def to_json(self) -> str:
        """Return all lines as a JSON document; numbers that JSON lacks become words."""
        content = {
            **{status: len(self.of(status)) for status in SEVERITY},
            "lines": [asdict(line) for line in self.lines],
        }
        return to_json(content, indent=1, not_finite=str)

    def write(self, output_dir: str) -> None:
        """Write ``self_check.json``, whole or not at all."""
        text = self.to_json() + "\n"
        write_atomically(Path(output_dir) / FILE_NAME, lambda file: file.write(text.encode()))


def merge(by_process: Sequence[Sequence[Line]]) -> SelfCheck:
    """Join what the processes found: for each name the worst line, of the first process that has it."""
    merged: dict[str, Line] = {}
    for process, lines in enumerate(by_process):
        for line in lines:
            known = merged.get(line.name)
            if known is not None and SEVERITY.index(line.status) <= SEVERITY.index(known.status):
                continue
            text = f"process {process}: {line.text}" if process else line.text
            merged[line.name] = Line(line.name, line.status, text, line.values)
    return SelfCheck(list(merged.values()))


def enforce(check: SelfCheck, self_check: str) -> None:
    """Act on what is wrong: raise (``stop``), or log it (``warn``).

    Raises:
        SelfCheckError: naming every wrong line; the same on every process.
    """
    if not check.wrong:
        return
    if self_check == "stop":
        listed = "; ".join(f"({n}) {line.name}: {line.text}" for n, line in enumerate(check.wrong, start=1))
        raise SelfCheckError(
            f"the self-check before the first step found {len(check.wrong)} thing(s) wrong: {listed}; mend "
            "them, or set train.self_check=warn to go on regardless"
        )
    for line in check.wrong:
        logger.warning("self-check: %s: %s", line.name, line.text)
