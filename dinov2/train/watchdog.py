"""Notices that a process of the run has died or hangs, and ends the others with a sentence that names it.

Every process writes a record into the store through which the launcher brought the processes together: a
count of its thread's beats, a count of the phases it has entered, and what it is doing. It reads the records
of all others and judges them by its own clock alone, as clocks of machines differ. The store is reached by a
connection of its own, so nothing here waits for the training thread, or makes it wait.
"""

import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

import torch.distributed as dist

from dinov2 import cli, distributed
from dinov2.data.processes import lives, this_process
from dinov2.errors import Interrupted, UserError

logger = logging.getLogger("dinov2")

T = TypeVar("T")

RUNNING, ENDED, FAILED = "running", "ended", "failed"
VERDICT = "verdict"

LONGEST_BEAT = 10.0  # seconds between two records
BEATS_PER_LIMIT = 10
URGENT_BEAT = 0.2  # while the training thread waits to hear why a collective has failed
VERDICT_SECONDS = 2.0  # for the thread to judge, after a silence has become long enough to tell
# A process that fails gives the others so long to find the same mistake themselves, see dinov2.cli.
GRACE_SECONDS = 6.0
FAREWELL_SECONDS = 25.0
WARY_BEAT = 1.0  # seconds between two records once a process has failed
SILENT_BEATS = 3  # missed by a process that is blamed for a collective that has failed

# What a request to the store raises that fails or is not answered.
_NO_ANSWER = (RuntimeError, ValueError, TimeoutError)
# What PyTorch raises where a process on the other side has gone.
_COLLECTIVE_WORDS = ("gloo", "nccl", "connection", "peer", "socket", "collective", "timed out", "watchdog")


@dataclass(frozen=True)
class Record:
    """What one process says of itself."""

    rank: int
    process: dict[str, Any]  # as dinov2.data.processes.this_process describes it
    beat: int = 0
    phase_number: int = 0
    phase: str = "starting"
    state: str = RUNNING
    why: str = ""  # of a failure

    @property
    def who(self) -> str:
        """The process in a sentence."""
        return f"rank {self.rank} (process {self.process['pid']} on {self.process['host']})"


@dataclass
class Observation:
    """A process as another one sees it; times are seconds of the observer's clock."""

    record: Record
    beat_at: float
    phase_at: float
    state_at: float

    def update(self, record: Record, now: float) -> None:
        """Take in the newest record."""
        if record.beat != self.record.beat:
            self.beat_at = now
        if record.phase_number != self.record.phase_number:
            self.phase_at = now
        if record.state != self.record.state:
            self.state_at = now
        self.record = record


def judge(
    observed: list[Observation],
    now: float,
    limit: float,
    *,
    silence: float | None = None,
    grace: float = GRACE_SECONDS,
    alive: Callable[[dict[str, Any]], bool | None] = lives,
) -> str:
    """Return which process keeps the others from going on, and how; an empty string if none does.

    Args:
        observed: all processes, this one among them.
        now: seconds of this process's clock.
        limit: ``train.process_timeout``.
        silence: seconds without a beat after which a process counts as gone; by default ``limit``.
        grace: seconds for which a process that has failed is not yet blamed.
        alive: tells whether a process lives, None if it is on another machine.
    """
    running = [seen for seen in observed if seen.record.state == RUNNING]
    for seen in running:
        if alive(seen.record.process) is False:
            return f"{seen.record.who} has died; it was {seen.record.phase}"
    for seen in observed:
        if seen.record.state == FAILED and now - seen.state_at >= grace:
            return f"{seen.record.who} has stopped with an error while {seen.record.phase}: {seen.record.why}"
    for seen in running:
        silent = now - seen.beat_at
        if silent >= (limit if silence is None else silence):
            return (
                f"{seen.record.who} has not answered for {silent:.0f} s: it is stopped, or its machine or "
                f"network is down; it was {seen.record.phase}"
            )
    furthest = max((seen.record.phase_number for seen in running), default=0)
    for seen in running:
        idle = now - seen.phase_at
        if seen.record.phase_number < furthest and idle >= limit:
            return (
                f"{seen.record.who} has kept the others waiting for {idle:.0f} s: it is {seen.record.phase}"
            )
    return ""


class Patience:
    """Calls the store without ever waiting for it longer than ``seconds``.

    PyTorch's client has a time-out, but after it asks the server to cancel the request, and waits for the
    answer to that for ever. So each call has a thread of its own, which is given up.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._pending: threading.Thread | None = None

    def call(self, function: Callable[..., T], *given: Any) -> T:
        """Return ``function(*given)``.

        Raises:
            TimeoutError: it does not end, or an earlier call has not ended yet.
            RuntimeError, ValueError: what the function raises.
        """
        if self._pending is not None:
            self._pending.join(self.seconds)
            if self._pending.is_alive():
                raise TimeoutError("an earlier request has not been answered")
        outcome: list[tuple[T | None, Exception | None]] = []

        def run() -> None:
            try:
                outcome.append((function(*given), None))
            except Exception as error:  # handed to the caller
                outcome.append((None, error))

        self._pending = threading.Thread(target=run, name="watchdog-store", daemon=True)
        self._pending.start()
        self._pending.join(self.seconds)
        if not outcome:
            raise TimeoutError(f"the request has not been answered for {self.seconds:g} s")
        self._pending = None
        result, error = outcome[0]
        if error is not None:
            raise error
        return result


class Watchdog:
    """Watches over the processes of the run while the block runs; without a process group it does nothing.

    Every rank must enter the block, and must call :meth:`phase` alike. A process that leaves the block
    with an error that comes from another's end says so and ends with status 1.

    Args:
        limit: ``train.process_timeout``, seconds.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.beat_seconds = min(LONGEST_BEAT, limit / BEATS_PER_LIMIT)
        # While a collective has failed; a process that lives is not silent for so long.
        self.urgent_silence = min(limit, SILENT_BEATS * self.beat_seconds + 1)
        self._patience = Patience(max(2.0, self.beat_seconds))
        self._record = Record(distributed.get_global_rank(), this_process())
        self._changing = threading.Lock()  # the record; never held while the store is asked
        self._thread: threading.Thread | None = None
        self._leaving, self._urgent, self._judged = threading.Event(), threading.Event(), threading.Event()
        self._wake = threading.Event()
        self._verdict = ""

    def phase(self, text: str) -> None:
        """Say what this process does from now on, as in "rank 1 was ..."."""
        with self._changing:
            self._record = replace(self._record, phase=text, phase_number=self._record.phase_number + 1)

    def __enter__(self) -> "Watchdog":
        if not distributed.is_enabled():
            return self
        # Keys of an earlier start of the run may still be in the launcher's store.
        name = distributed.broadcast_object(uuid.uuid4().hex)
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        patience = timedelta(seconds=self._patience.seconds)
        store = dist.TCPStore(host, port, is_master=False, timeout=patience)
        self._store = dist.PrefixStore(f"dinov2/watchdog/{name}", store)
        self._store.set_timeout(patience)
        self._keys = [f"rank_{rank}" for rank in range(distributed.get_global_size())]
        if distributed.is_main_process():
            self._store.set(VERDICT, "")
        self._write()
        distributed.barrier()
        self._observed = self._first_look()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._thread is None:
            return
        if error is not None and _from_a_collective(error):
            cli.abandon(self._explain(error))
        self._leaving.set()
        self._wake.set()
        self._thread.join(self.limit)
        if error is None or isinstance(error, Interrupted):
            self._farewell(ENDED)
        else:
            text = " ".join(str(error).split())[:500]
            self._farewell(
                FAILED, text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
            )

    def _explain(self, error: BaseException) -> str:
        """Wait for the thread to find out which process is to blame for a failed collective."""
        asked_at = time.monotonic()
        self._urgent.set()
        self._wake.set()
        self._judged.wait(self.urgent_silence + VERDICT_SECONDS)
        if self._verdict:
            return self._sentence(self._verdict)
        cause = " ".join(str(error).split())[:300]
        all_answer = all(seen.record.state == RUNNING and seen.beat_at > asked_at for seen in self._observed)
        still = ", though all of them still answer" if all_answer else ""
        return (
            f"while {self._record.phase} the processes lost each other{still} ({cause}): see whether the "
            f"network between the machines works; {_AGAIN}"
        )

    def _farewell(self, state: str, why: str = "") -> None:
        """Write the last record; the process that may hold the store waits for those of the others."""
        with self._changing:
            self._record = replace(self._record, state=state, why=why)
        # A failure is told at once where the store outlives this process.
        waits = distributed.is_main_process() and (state == ENDED or not _launcher_holds_the_store())
        try:
            self._write()
            until = time.monotonic() + min(self.limit, FAREWELL_SECONDS)
            while waits and time.monotonic() < until:
                if all(record.state != RUNNING for record in self._read()[1]):
                    break
                time.sleep(0.02)
        except _NO_ANSWER as error:
            logger.debug("the last record could not be left: %s", error)

    def _write(self) -> None:
        with self._changing:
            self._record = replace(self._record, beat=self._record.beat + 1)
            record = self._record
        self._patience.call(self._store.set, self._keys[record.rank], json.dumps(asdict(record)))

    def _read(self) -> tuple[str, list[Record]]:
        verdict, *texts = self._patience.call(self._store.multi_get, [VERDICT, *self._keys])
        return verdict.decode(), [Record(**json.loads(text)) for text in texts]

    def _first_look(self) -> list[Observation]:
        now = time.monotonic()
        return [Observation(record, now, now, now) for record in self._read()[1]]

    def _watch(self) -> None:
        lost_at: float | None = None
        while not self._leaving.is_set():
            now, verdict, urgent = time.monotonic(), "", self._urgent.is_set()
            try:
                self._write()
                verdict, records = self._read()
                lost_at = None
                for seen, record in zip(self._observed, records, strict=True):
                    seen.update(record, time.monotonic())
            except _NO_ANSWER as error:
                lost_at = now if lost_at is None else lost_at
                logger.debug("the store of the processes cannot be reached: %s", error)
            if not verdict:
                verdict = self._judge(urgent, lost_at)
                if verdict and lost_at is None:
                    self._publish(verdict)
            if verdict and not self._leaving.is_set():
                self._verdict = verdict
                self._judged.set()
                if not urgent:
                    self._give_up(reachable=lost_at is None)
                return
            self._wake.wait(URGENT_BEAT if urgent else self._pause())
            self._wake.clear()

    def _pause(self) -> float:
        failed = any(seen.record.state == FAILED for seen in self._observed)
        return min(WARY_BEAT, self.beat_seconds) if failed else self.beat_seconds

    def _give_up(self, *, reachable: bool) -> None:
        """End this process with the verdict; who waits for it in :meth:`_farewell` hears that it goes."""
        if reachable:
            with self._changing:
                self._record = replace(self._record, state=ENDED)
            try:
                self._write()
            except _NO_ANSWER as error:
                logger.debug("the last record could not be left: %s", error)
        cli.abandon(self._sentence(self._verdict))

    def _judge(self, urgent: bool, lost_at: float | None) -> str:
        now = time.monotonic()
        if lost_at is None:
            silence = self.urgent_silence if urgent else None
            grace = 0.0 if urgent else GRACE_SECONDS
            return judge(self._observed, now, self.limit, silence=silence, grace=grace)
        # Nothing new is heard of anybody. The last records still tell who has died on this machine.
        for seen in self._observed:
            if seen.record.state == RUNNING and lives(seen.record.process) is False:
                return f"{seen.record.who} has died; it was {seen.record.phase}"
        if now - lost_at >= (GRACE_SECONDS if urgent else self.limit):
            first = self._observed[0].record
            return (
                f"the store of the processes at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} has "
                f"not answered for {now - lost_at:.0f} s: {first.who} or its launcher, which holds it, has "
                f"ended or is stopped; that rank was {first.phase}"
            )
        return ""

    def _publish(self, verdict: str) -> None:
        """Let every process end with the same sentence; who holds the store gives the others time to read."""
        try:
            self._patience.call(self._store.set, VERDICT, verdict)
        except _NO_ANSWER as error:
            logger.debug("the verdict could not be shared: %s", error)
            return
        if distributed.is_main_process():
            time.sleep(min(2 * self.beat_seconds, GRACE_SECONDS))

    def _sentence(self, verdict: str) -> str:
        return f"{verdict}; all processes stop (train.process_timeout is {self.limit:g} s). {_AGAIN}"


_AGAIN = "The same command goes on from the last checkpoint"


def _launcher_holds_the_store() -> bool:
    """Tell whether torchrun keeps the store; else it is in the process of rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _from_a_collective(error: BaseException) -> bool:
    """Tell whether PyTorch says that the processes could not exchange something."""
    if isinstance(error, UserError) or not isinstance(error, RuntimeError):
        return False
    text = f"{type(error).__name__} {error}".lower()
    return isinstance(error, dist.DistError) or any(word in text for word in _COLLECTIVE_WORDS)
