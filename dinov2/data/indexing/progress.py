"""How far a build is: a line that is redrawn on a terminal, a line of log now and then elsewhere."""

import logging
import time

from dinov2.terminal import REDRAW_SECONDS, StatusLine

logger = logging.getLogger("dinov2")

LOG_SECONDS = 10.0


class BuildProgress:
    """Counts slides and tiles and shows them with rate, share and time left; use it as a context manager.

    Args:
        total: slides to list.
    """

    def __init__(self, total: int) -> None:
        self.total, self.slides, self.tiles = total, 0, 0
        self._terminal = StatusLine()
        self._period = REDRAW_SECONDS if self._terminal.is_there else LOG_SECONDS
        self._start = time.monotonic()
        self._next = self._start + self._period

    def __enter__(self) -> "BuildProgress":
        return self

    def __exit__(self, *unused: object) -> None:
        if self._terminal.is_there:
            self._show()
            self._terminal.end()

    def advance(self, slides: int, tiles: int) -> None:
        """Note that further slides are listed, with so many tiles."""
        self.slides += slides
        self.tiles += tiles
        self.tick()

    def tick(self) -> None:
        """Show the progress if it is time to."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + self._period
            self._show()

    def line(self) -> str:
        """Return counts, share, rate and time left."""
        seconds = max(time.monotonic() - self._start, 1e-3)
        share = self.slides / self.total if self.total else 1.0
        left = f", {_duration(seconds / share - seconds)} left" if share else ""
        return (
            f"{self.slides:,} of {self.total:,} slides ({share:.0%}), {self.tiles:,} tiles, "
            f"{self.tiles / seconds:,.0f} tiles/s{left}"
        )

    def _show(self) -> None:
        if self._terminal.is_there:
            self._terminal.draw(self.line())
        else:
            logger.info("%s", self.line())


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
