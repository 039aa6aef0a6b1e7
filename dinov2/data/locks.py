"""Locks between processes: one holder at a time (:class:`LockFile`), or one after the other.

A lock file says who holds it, and its holder renews it: other machines see whether it lives. It only saves
double work, because what is made below it is put in place as a whole.
"""

import contextlib
import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dinov2.data.datasets.arrays import writing
from dinov2.data.processes import lives, this_process
from dinov2.errors import OutputError

logger = logging.getLogger("dinov2")

# Renewed every 20 s by a living process; file servers may lag behind by a minute.
RENEW_SECONDS = 20.0
STALE_SECONDS = 300.0


class LockFile:
    """A lock that one process holds.

    It is stale, and taken over, when its process has ended (seen at once on its own machine), or when it has
    not been renewed for ``stale_seconds`` by the clock of the file system (from another machine).

    Args:
        path: of the lock file, on a file system that all sharers see; its folder is made where needed.
        stale_seconds: age of the last renewal after which the lock of another machine counts as left behind.
        details: plain values that the lock tells beside its process.
        left_behind: whether a holder, given as what its lock tells, has ended for reasons the caller knows.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        stale_seconds: float = STALE_SECONDS,
        details: Mapping[str, Any] | None = None,
        left_behind: Callable[[Mapping[str, Any]], bool] = lambda _: False,
    ) -> None:
        self.path = Path(path)
        self._stale_seconds = stale_seconds
        self._details = dict(details or {})
        self._left_behind = left_behind
        self._token = uuid.uuid4().hex
        self._content = b""
        self._next_renewal = 0.0

    def acquire(self) -> bool:
        """Take the lock without waiting; return False if a living process has it, or is taking it over.

        Raises:
            OutputError: the folder can not be written.
        """
        self._content = json.dumps({**self._details, **this_process(), "token": self._token}).encode("ascii")
        self._next_renewal = time.monotonic() + RENEW_SECONDS
        draft = self._beside("draft")
        with writing(str(self.path)):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                draft.write_bytes(self._content)
                for _ in range(3):
                    if self._place(draft):
                        return True
                    if not self._is_stale():
                        return False
                    self._remove_stale()
            finally:
                draft.unlink(missing_ok=True)
        return False

    def owned(self) -> bool:
        """Whether this process still has the lock."""
        return self._content != b"" and self._read() == self._content

    def renew(self) -> bool:
        """Show that the process lives; return False if the lock was found to be another's.

        It looks every ``RENEW_SECONDS`` only, so it may be called all the time.

        Raises:
            OutputError: the lock can not be written.
        """
        if time.monotonic() < self._next_renewal:
            return True
        self._next_renewal = time.monotonic() + RENEW_SECONDS
        if not self.owned():
            return False
        with writing(str(self.path)):
            try:
                os.utime(self.path)
            except FileNotFoundError:  # deleted since
                return False
        return True

    def release(self) -> None:
        """Give the lock back."""
        if self.owned():
            self.path.unlink(missing_ok=True)

    def holder(self) -> str:
        """Return who has the lock, for a sentence."""
        unknown = {"pid": "unknown", "host": "unknown host", "since": "an unknown time"}
        return "process {pid} on {host}, since {since}".format_map({**unknown, **_parsed(self._read())})

    def holder_lives(self) -> bool | None:
        """Return whether the holder lives; None if it is on another machine, or nobody has the lock."""
        return lives(_parsed(self._read()))

    def last_renewal(self) -> int | None:
        """Return when the lock was renewed by the clock of the file system, in ns; None without a lock."""
        try:
            return self.path.stat().st_mtime_ns
        except FileNotFoundError:
            return None

    def _beside(self, ending: str) -> Path:
        return self.path.with_name(f".{self.path.name}.{self._token}.{ending}")

    def _read(self) -> bytes:
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return b""

    def _place(self, draft: Path) -> bool:
        """Bring the lock into being, with all its content at once where the file system has hard links."""
        try:
            os.link(draft, self.path)
        except FileExistsError:
            return self.owned()  # a file server may have made the link and lost its answer
        except OSError as error:
            logger.debug("no hard link for %s (%s)", self.path, error)
            try:
                file = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
            except FileExistsError:
                return False
            # Whoever reads it before it is written finds a lock of nobody known, which is not stale so soon.
            with os.fdopen(file, "wb") as lock:
                lock.write(self._content)
        return True

    def _is_stale(self) -> bool:
        holder = _parsed(self._read())
        holder_lives = lives(holder)
        if holder_lives is None and self._left_behind(holder):
            return True
        return self._age(self.path) > self._stale_seconds if holder_lives is None else not holder_lives

    def _age(self, path: Path) -> float:
        """Return the seconds since a file was touched, by the file server's clock; infinite without it."""
        probe = self._beside("clock")
        probe.touch()
        try:
            return probe.stat().st_mtime - path.stat().st_mtime
        except FileNotFoundError:
            return float("inf")
        finally:
            probe.unlink(missing_ok=True)

    def _remove_stale(self) -> None:
        """Remove a stale lock. One process at a time may, so that none removes the new lock of another."""
        right = self.path.with_name(f".{self.path.name}.takeover")
        try:
            os.close(os.open(right, os.O_CREAT | os.O_EXCL, 0o666))
        except FileExistsError:
            if self._age(right) > self._stale_seconds:  # its process died in the lines below
                right.unlink(missing_ok=True)
            return
        try:
            if self._is_stale():
                self.path.unlink(missing_ok=True)
        finally:
            right.unlink(missing_ok=True)


@contextlib.contextmanager
def one_at_a_time(path: str | Path, *, what: str) -> Iterator[bool]:
    """Wait until no other process or thread of this machine is in here; the others find the work done.

    Some file systems lock for all machines that share them, and some have no such locks: then the work is
    done twice.

    Args:
        path: of the lock file, which is there while somebody is in here.
        what: is made in here, for the sentence that says that it can not be.

    Yields:
        whether the file system has such locks: what lies about in here is left over then.

    Raises:
        OutputError: the folder can not be written.
    """
    file, alone = _locked(Path(path), what)
    with os.fdopen(file, "wb"):
        try:
            yield alone
        finally:
            Path(path).unlink(missing_ok=True)


def _locked(path: Path, what: str) -> tuple[int, bool]:
    """Return the lock file, open, and whether it is locked."""
    import fcntl

    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(path, os.O_CREAT | os.O_WRONLY, 0o666)
        except OSError as error:
            raise OutputError(
                f'{what} is not built yet and "{path.parent}" can not be written ({error}): name a folder '
                "for it with extra="
            ) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            logger.warning('the file system of "%s" has no locks (%s)', path.parent, error)
            return file, False
        # Who was in here before has deleted the file, and the next who comes makes a new one.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), path.stat()):
                return file, True
        os.close(file)


def _parsed(content: bytes) -> dict:
    try:
        parsed = json.loads(content)
    except ValueError:
        return {}
    return parsed if isinstance(parsed, dict) else {}
