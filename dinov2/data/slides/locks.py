"""A lock file per slide, so that several machines can share one list of slides.

The lock only saves double work: a slide is moved to its place as a whole, and two processes that made the
same slide have made the same files. A lock is stale, and taken over, when its process has ended (seen at
once on its own machine) or when it has not been renewed for minutes (from another machine).
"""

import contextlib
import json
import os
import socket
import uuid
from pathlib import Path

from dinov2.errors import OutputError

# Renewed every 20 s by a living process; file servers may lag behind by a minute.
RENEW_SECONDS = 20.0
STALE_SECONDS = 300.0


class SlideLock:
    """A lock that one process holds.

    Args:
        path: of the lock file, on a file system that all sharers see.
        stale_seconds: age of the last renewal after which the lock of another machine counts as left behind.
    """

    def __init__(self, path: Path, *, stale_seconds: float = STALE_SECONDS) -> None:
        self.path = Path(path)
        self._token = uuid.uuid4().hex
        self._stale_seconds = stale_seconds

    def acquire(self) -> bool:
        """Take the lock; return False if a living process has it.

        Raises:
            OutputError: the file system has no hard links.
        """
        for _ in range(3):
            if self._create():
                return True
            held = _read(self.path)
            if held is not None and not self._is_stale(held):
                return False
            self._remove_stale(held)
        return False

    def owned(self) -> bool:
        """Whether this process still has the lock."""
        held = _read(self.path)
        return held is not None and held.get("token") == self._token

    def renew(self) -> None:
        """Show that the process lives."""
        if self.owned():
            os.utime(self.path)

    def release(self) -> None:
        """Give the lock back."""
        if self.owned():
            self.path.unlink(missing_ok=True)

    def _create(self) -> bool:
        """Bring the lock into being with all its content at once: a link fails if the name is taken."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_name(f".{self.path.name}.{self._token}")
        content = {
            "token": self._token,
            "machine": _machine(),
            "pid": os.getpid(),
            "started": _start_time(os.getpid()),
            "host": socket.gethostname(),
        }
        draft.write_text(json.dumps(content), "utf-8")
        try:
            os.link(draft, self.path)
        except FileExistsError:
            return False
        except OSError as error:
            raise OutputError(
                f'can not lock "{self.path}" ({error}): the output has to be on a file system with hard links'
            ) from error
        finally:
            draft.unlink()
        return True

    def _is_stale(self, held: dict) -> bool:
        if held.get("machine") == _machine():
            started = _start_time(held.get("pid", -1))
            return started is None or started != held.get("started")
        return self._age() > self._stale_seconds

    def _age(self) -> float:
        """Seconds since the last renewal, by the clock of the file server."""
        probe = self.path.with_name(f".{self.path.name}.{self._token}.clock")
        probe.touch()
        try:
            return probe.stat().st_mtime - self.path.stat().st_mtime
        except FileNotFoundError:
            return 0.0
        finally:
            probe.unlink(missing_ok=True)

    def _remove_stale(self, held: dict | None) -> None:
        aside = self.path.with_name(f".{self.path.name}.{self._token}.stale")
        try:
            self.path.rename(aside)
        except FileNotFoundError:
            return
        taken = _read(aside)
        if taken is not None and taken.get("token") != (held or {}).get("token"):
            # Another process was quicker, and this is its new lock: give it back.
            with contextlib.suppress(FileExistsError):
                os.link(aside, self.path)
        aside.unlink(missing_ok=True)


def _read(path: Path) -> dict | None:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _machine() -> str:
    """Name of the space in which process numbers mean the same: the boot of a machine, or a container."""
    parts = [socket.gethostname()]
    try:
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))  # noqa: PTH115
    except OSError:
        pass
    return "/".join(parts)


def _start_time(pid: int) -> str | None:
    """When a process started, None if there is no such process; numbers of processes are used again."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        if Path("/proc/self/stat").exists() or not _exists(pid):
            return None
        return "unknown"
    return None if fields[0] in "ZX" else fields[19]  # a zombie has ended


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
