"""What follows from evaluations in the loop: a base class that draws no conclusion."""

from collections.abc import Sequence
from dataclasses import dataclass

from dinov2.train.monitoring.records import Record


@dataclass(frozen=True)
class Decision:
    """Whether the run is to end now, and why: one clause for the log.

    Attributes:
        failed: It ends because something is wrong, and not because it is as good as it gets.
    """

    stop: bool = False
    why: str = ""
    failed: bool = False


class Judge:
    """Draws conclusions from records; all processes call its methods, with equal records."""

    def collapse(self, record: Record, start: Record | None) -> tuple[str, ...]:
        """Return one clause per reason to call the features of a new record collapsed.

        Args:
            record: Not yet in the file.
            start: That of the starting backbone, if there is one; ``record`` itself at iteration 0.
        """
        return ()

    def on_record(self, records: Sequence[Record], *, at: int, new: bool = True) -> Decision:
        """Decide how to go on; called after a record is in the file, and when a run is resumed.

        Args:
            records: All of the run, in the order of their iterations; at least one.
            at: Iterations that the networks have done: a record of as many is of these networks.
            new: Whether the newest record has just been made.
        """
        return Decision()

    def conclude(self, records: Sequence[Record]) -> None:
        """Say what the run has come to; called at its end."""
