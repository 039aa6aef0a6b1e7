"""Steps that were skipped because a loss or a gradient was not finite: how many, and when it is too many."""

import logging

logger = logging.getLogger("dinov2")

LOGGED = 3  # skipped steps with a log line of their own; then only every power of two


class BadSteps:
    """Counts skipped steps, alike on every rank.

    Args:
        limit: ``train.max_bad_steps``, how many in a row end the run's patience.
        total: those that were skipped before, in the part of the run that is continued.
    """

    def __init__(self, limit: int, total: int = 0) -> None:
        self.limit = limit
        self.total = total
        self.good = 0  # of this start
        self.in_a_row = 0

    @property
    def too_many(self) -> bool:
        """Whether so many steps in a row were skipped that going on makes no sense."""
        return self.in_a_row >= self.limit

    @property
    def only_bad(self) -> bool:
        """Whether steps were tried and not one has succeeded since the start; such a run has no result."""
        return self.in_a_row > 0 and not self.good

    def update(self, iteration: int, problem: str) -> None:
        """Take in one step.

        Args:
            iteration: zero-based.
            problem: why the step was skipped; empty for a good step.
        """
        if not problem:
            self.good += 1
            self.in_a_row = 0
            return
        self.total += 1
        self.in_a_row += 1
        if self.total <= LOGGED or self.total & (self.total - 1) == 0:
            logger.warning(
                "iteration %d: the step is skipped, because %s; %d skipped since the start, %d in a row",
                iteration,
                problem,
                self.total,
                self.in_a_row,
            )

    def forgive(self) -> None:
        """Begin a new row, after the run has gone back to a checkpoint."""
        self.in_a_row = 0
