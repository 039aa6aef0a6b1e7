"""Where the log goes: a short console on the main process, one full file per process.

The meters that the training loop and the evaluations print are in :mod:`dinov2.logging.helpers`.
"""

import logging
import sys
from pathlib import Path
from typing import TextIO

from dinov2 import distributed
from dinov2.errors import OutputError, printable
from dinov2.logging.helpers import MetricLogger, SmoothedValue

__all__ = ["MetricLogger", "SmoothedValue", "setup_logging"]

# One letter for the level, then date and time: lines sort by time and can be filtered by their first letter.
FILE_FORMAT = "%(levelname).1s%(asctime)s %(process)s %(name)s %(filename)s:%(lineno)s] %(message)s"
FILE_DATE_FORMAT = "%Y%m%d %H:%M:%S"
CONSOLE_DATE_FORMAT = "%H:%M:%S"

# The handlers of the latest set-up by logger name, so that the next one replaces them and no others.
_handlers: dict[str, list[logging.Handler]] = {}


class ConsoleHandler(logging.StreamHandler):
    """Writes to whatever ``sys.stdout`` is at the time, which a notebook or a test may exchange."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)
        self.setFormatter(ConsoleFormatter())

    @property
    def stream(self) -> TextIO:
        return sys.stdout


class Formatter(logging.Formatter):
    """A formatter whose lines can be written whatever file names they hold."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class ConsoleFormatter(Formatter):
    """Time and message; the level only where it asks for attention."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(message)s", CONSOLE_DATE_FORMAT)

    def formatMessage(self, record: logging.LogRecord) -> str:
        if record.levelno >= logging.WARNING:
            record.message = f"{record.levelname.lower()}: {record.message}"
        return super().formatMessage(record)


def setup_logging(
    output: str | None = None,
    *,
    name: str | None = None,
    level: int = logging.DEBUG,
    capture_warnings: bool = True,
) -> logging.Logger:
    """Send a logger to standard output (main process only) and to a file (every process).

    A second call closes the files of the first and starts over, so two runs in one process keep their logs
    apart. Files are appended to.

    Args:
        output: A folder, which gets ``logs/log.txt`` and ``logs/log.txt.rank<r>`` for the other processes; a
            name ending in ``.txt`` or ``.log`` is taken as the file itself. None means no file.
        name: The logger to set up, None for the root logger.
        level: The lowest level that is recorded.
        capture_warnings: Send Python warnings to the log, too.

    Raises:
        OutputError: The file cannot be written.
    """
    logging.captureWarnings(capture_warnings)
    logger = logging.getLogger(name)
    logger.setLevel(level)
    if name is not None:
        logger.propagate = False
    for handler in _handlers.pop(logger.name, []):
        logger.removeHandler(handler)
        handler.close()

    handlers: list[logging.Handler] = []
    if output:
        handlers.append(_file_handler(output))
    if distributed.is_main_process():
        handlers.append(ConsoleHandler())
    for handler in handlers:
        handler.setLevel(level)
        logger.addHandler(handler)
    _handlers[logger.name] = handlers
    return logger


def _file_handler(output: str) -> logging.FileHandler:
    path = Path(output) if output.endswith((".txt", ".log")) else Path(output) / "logs" / "log.txt"
    if not distributed.is_main_process():
        path = path.with_name(f"{path.name}.rank{distributed.get_global_rank()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(path, mode="a", encoding="utf-8")
    except OSError as error:
        raise OutputError(
            f"the log file {path} cannot be written ({error.strerror}): choose another --output-dir"
        ) from error
    handler.setFormatter(Formatter(FILE_FORMAT, FILE_DATE_FORMAT))
    return handler
