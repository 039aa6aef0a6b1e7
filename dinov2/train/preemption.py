"""Signals that ask a run to stop: remembered when they come, obeyed at the next step boundary by all ranks.

Schedulers announce the end of a job by a signal, often to every process and not at the same moment. A handler
only notes it. Every training step sums the notes of all ranks (:func:`dinov2.train.step.train_step`), so all
ranks save and stop after the same step. docs/failures.md has the details.
"""

import logging
import signal
import threading
from types import FrameType
from typing import Any

import torch

from dinov2 import distributed
from dinov2.errors import Interrupted

logger = logging.getLogger("dinov2")

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


def signal_name(number: int) -> str:
    """Return e.g. ``SIGTERM``."""
    return signal.Signals(number).name


class StopRequest:
    """Notes the signals of this process while the block runs; the handlers of before come back afterwards.

    Outside the main thread, where Python allows no handlers, nothing is installed. The first Ctrl-C counts
    as a request like the others; a second one ends the process at once (``KeyboardInterrupt``).
    """

    def __init__(self) -> None:
        self.signal_number = 0  # the first that came; 0 if none did
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            # None stands for a handler that was not set from Python and cannot be set again from here.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}

    @property
    def requested(self) -> bool:
        """Whether this process was asked to stop."""
        return bool(self.signal_number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # No logging here: the signal may have come while the main thread holds a lock of the log.
        if number == signal.SIGINT and self.signal_number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_number = self.signal_number or number

    def stop_before_training(self) -> None:
        """Stop here, on all ranks, if any was asked to; every rank must call this.

        Raises:
            Interrupted: on every rank.
        """
        number = self.agreed_signal()
        if number:
            raise Interrupted(
                f"the signal {signal_name(number)} came before the first step, so there is nothing "
                "to save; the same command starts the run again",
                number,
            )

    def agreed_signal(self) -> int:
        """Return the same signal number on all ranks (the largest that any of them got), 0 for none."""
        number = torch.tensor(float(self.signal_number), device=distributed.collective_device())
        return int(distributed.all_reduce_max_(number).item())
