"""One training run per output directory: who writes there, and whose place may be taken."""

import logging
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from dinov2 import distributed
from dinov2.data.locks import LockFile
from dinov2.errors import OutputError, UserError

logger = logging.getLogger("dinov2")

FILE_NAME = ".running"
# A living run shows itself every 20 seconds; file servers may show that a minute later.
STALE_SECONDS = 120.0
RENEW_SECONDS = 5.0  # how often the thread offers to renew; the lock does it when it is time
POLL_SECONDS = 2.0

# Environment variables of a launcher that starts a job again: (name of the job, count of its restarts).
_JOBS = (
    ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"),
    ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"),
    ("DINOV2_JOB", "DINOV2_JOB_RESTARTS"),  # of dinov2.run, which has executors beside Slurm
)


class OutputLock:
    """The right to train into an output directory, which the main process holds for all.

    A run that was killed is succeeded at once where that can be seen: on its own machine, or by a later start
    of the same job. On another machine a run counts as dead when it has not shown itself for
    ``STALE_SECONDS``. As a context manager it gives the right back at the end.
    """

    def __init__(self) -> None:
        self._lock: LockFile | None = None
        self._stop = threading.Event()
        self._renewing: threading.Thread | None = None

    def claim(self, output_dir: str) -> None:
        """Take the directory for this run; to be called by all processes, which stop together.

        Raises:
            OutputError: another run has it, or nothing can be written there.
        """
        problem = ""
        if distributed.is_main_process():
            try:
                self._take(Path(output_dir))
            except UserError as error:
                problem = str(error)
        problem = distributed.broadcast_object(problem)
        if problem:
            raise OutputError(problem)

    def check(self) -> None:
        """Make sure in the main process that no other run has taken the directory over.

        Raises:
            OutputError: it has, because this one seemed dead, or the lock was deleted.
            OSError: the lock cannot be read.
        """
        if self._lock is None or self._lock.owned():
            return
        folder = self._lock.path.parent
        if not self._lock.path.exists():
            raise OutputError(f"the lock {self._lock.path} was deleted, perhaps by another run in {folder}")
        raise OutputError(
            f"another run has taken over {folder} while this one did not show that it lives: "
            f"{self._lock.holder()}"
        )

    def release(self) -> None:
        """Give the directory back."""
        self._stop.set()
        if self._renewing is not None:
            self._renewing.join()
        if self._lock is not None:
            try:
                self._lock.release()
            except OSError as error:
                logger.warning("the lock of the output directory cannot be given back: %s", error)
        self._lock = self._renewing = None

    def __enter__(self) -> "OutputLock":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()

    def _take(self, output_dir: Path) -> None:
        lock = LockFile(
            output_dir / FILE_NAME,
            stale_seconds=STALE_SECONDS,
            details=job_details(os.environ),
            left_behind=lambda holder: is_earlier_start(holder, os.environ),
        )
        seen = None
        while not lock.acquire():
            renewed = lock.last_renewal()
            if lock.holder_lives() or (seen is not None and renewed not in (seen, None)):
                raise OutputError(
                    f'another run writes to the output directory "{output_dir}" ({lock.holder()}): wait for '
                    "its end, stop it, or choose another --output-dir"
                )
            if seen is None:
                logger.warning(
                    'a run on another machine may be writing to "%s" (%s): waiting until it shows that it '
                    "lives, %.0f seconds at most",
                    *(output_dir, lock.holder(), STALE_SECONDS),
                )
            seen = renewed if seen is None else seen
            time.sleep(POLL_SECONDS)
        self._lock = lock
        self._stop.clear()
        self._renewing = threading.Thread(target=self._renew, name="output lock", daemon=True)
        self._renewing.start()

    def _renew(self) -> None:
        while not self._stop.wait(RENEW_SECONDS):
            try:
                if not self._lock.renew():
                    logger.error(
                        "the lock %s is no longer that of this run, which stops at its next save",
                        self._lock.path,
                    )
                    return
            except OSError as error:  # a file server may be away for a while
                logger.warning("the lock of the output directory is not renewed: %s", error)


def job_details(environment: Mapping[str, str]) -> dict[str, Any]:
    """Return what identifies the start of a job that launchers repeat, as plain values."""
    return {
        job: [environment[job], int(environment.get(restarts) or 0)]
        for job, restarts in _JOBS
        if environment.get(job, "none") not in ("", "none")  # none: torchrun was not given a name
    }


def is_earlier_start(holder: Mapping[str, Any], environment: Mapping[str, str]) -> bool:
    """Return whether a lock was taken by an earlier start of the same job, which has ended for sure."""
    here = job_details(environment)
    for job in here.keys() & holder.keys():
        recorded = holder[job]
        if isinstance(recorded, list) and len(recorded) == 2 and isinstance(recorded[1], int):
            name, restarts = here[job]
            if recorded[0] == name and recorded[1] < restarts:
                return True
    return False
