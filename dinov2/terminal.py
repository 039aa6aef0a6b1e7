"""A line of standard error that is redrawn, where that is a terminal."""

import sys

REDRAW_SECONDS = 0.2  # more often is not seen


class StatusLine:
    """The line that a terminal shows while something goes on; elsewhere, as in a log file, it is not there.

    Attributes:
        is_there: whether standard error is a terminal; only then the line may be drawn.
    """

    def __init__(self) -> None:
        self.is_there = sys.stderr is not None and sys.stderr.isatty()

    def draw(self, text: str) -> None:
        """Put a text in place of the last one."""
        sys.stderr.write(f"\r{text}\x1b[K")
        sys.stderr.flush()

    def end(self) -> None:
        """Leave the line as it is; what is written next goes below it."""
        sys.stderr.write("\n")
