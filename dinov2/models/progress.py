"""How far a download is: a bar on a terminal, a line of log for every tenth elsewhere."""

import logging
import time

from dinov2.terminal import REDRAW_SECONDS, StatusLine

logger = logging.getLogger("dinov2")

BAR_WIDTH = 30
LOGGED_SHARE = 0.1
LOGGED_BYTES = 100_000_000  # where the size is not known


class Progress:
    """Shows the progress of one download; use it as a context manager.

    Args:
        name: What is downloaded.
        done: Bytes that an earlier attempt has left.
        total: Size of the file in bytes, or None if the server does not say.
    """

    def __init__(self, name: str, done: int, total: int | None) -> None:
        self.name, self.done, self.total = name, done, total
        self.terminal = StatusLine()
        self.start, self.start_time = done, time.monotonic()
        self.next_draw = 0.0
        self.step = max(1, int((total or 0) * LOGGED_SHARE)) if total else LOGGED_BYTES
        self.next_log = (done // self.step + 1) * self.step

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *unused: object) -> None:
        if self.terminal.is_there:
            self._draw()
            self.terminal.end()

    def advance(self, count: int) -> None:
        """Note that ``count`` more bytes are there."""
        self.done += count
        if self.terminal.is_there:
            if time.monotonic() >= self.next_draw:
                self._draw()
                self.next_draw = time.monotonic() + REDRAW_SECONDS
        elif self.done >= self.next_log:
            self.next_log = (self.done // self.step + 1) * self.step
            logger.info("%s", self.line())

    def line(self) -> str:
        """Return name, share, sizes, speed and remaining time."""
        speed = (self.done - self.start) / max(time.monotonic() - self.start_time, 1e-3)
        if not self.total:
            return f"{self.name}: {self.done / 1e6:.1f} MB, {speed / 1e6:.1f} MB/s"
        left = f", {(self.total - self.done) / speed:.0f} s left" if speed else ""
        return (
            f"{self.name}: {self.done / self.total:.0%} of {self.total / 1e6:.1f} MB, "
            f"{speed / 1e6:.1f} MB/s{left}"
        )

    def _draw(self) -> None:
        filled = round(BAR_WIDTH * min(1.0, self.done / self.total)) if self.total else 0
        bar = f"[{'#' * filled:<{BAR_WIDTH}}] " if self.total else ""
        self.terminal.draw(f"{bar}{self.line()}")
