"""One builder at a time: a lock file that says who builds, and that goes stale with its process or host."""

import json
import os
import socket
import time
import uuid
from pathlib import Path
from types import TracebackType

from dinov2.data.datasets.arrays import writing
from dinov2.errors import OutputError

HEARTBEAT_SECONDS = 30.0
# A builder on another host whose heart has not beaten for this long is taken for dead.
STALE_SECONDS = 900.0
_SETTLE_SECONDS = 0.5


class BuildLock:
    """Held while an index is built; use it as a context manager and call :meth:`beat` now and then.

    A lock of this host is stale when its process is gone; one of another host when it has not been touched
    for :data:`STALE_SECONDS`, by the file system's own clock.

    Args:
        path: the lock file; its folder is made where needed.

    Raises:
        OutputError: another builder holds it, or the folder can not be written.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self._content = json.dumps({**_this_process(), "id": uuid.uuid4().hex}).encode("ascii")
        self._next_beat = 0.0

    def __enter__(self) -> "BuildLock":
        with writing(str(self.path)):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                file = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
            except FileExistsError:
                self._take_over()
            else:
                os.write(file, self._content)
                os.close(file)
        self._next_beat = time.monotonic() + HEARTBEAT_SECONDS
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._read() == self._content:
            self.path.unlink(missing_ok=True)

    def beat(self) -> None:
        """Show that this builder lives; cheap enough to be called all the time.

        Raises:
            OutputError: the lock is no longer ours.
        """
        if time.monotonic() < self._next_beat:
            return
        self._next_beat = time.monotonic() + HEARTBEAT_SECONDS
        if self._read() != self._content:
            raise OutputError(
                f'the lock "{self.path}" was deleted or taken by another builder, so this one stops: run it '
                "again when the other is done; what it has listed is kept"
            )
        with writing(str(self.path)):
            os.utime(self.path)

    def _read(self) -> bytes:
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return b""

    def _take_over(self) -> None:
        """Put our lock in the place of a stale one."""
        ours = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex}.tmp")
        try:
            ours.write_bytes(self._content)
            holder = self._holder()
            if not self._is_stale(holder, now=ours.stat().st_mtime):
                raise OutputError(self._in_use(holder))
            ours.replace(self.path)
            # Of two that found the same stale lock the later one has it now.
            time.sleep(_SETTLE_SECONDS)
            if self._read() != self._content:
                raise OutputError(self._in_use(self._holder()))
        finally:
            ours.unlink(missing_ok=True)

    def _holder(self) -> dict:
        try:
            content = json.loads(self._read())
        except ValueError:
            return {}
        return content if isinstance(content, dict) else {}

    def _is_stale(self, holder: dict, now: float) -> bool:
        here = _this_process()
        if all(holder.get(key) == here[key] for key in ("host", "namespace")):
            return not _lives(holder)
        try:
            return now - self.path.stat().st_mtime > STALE_SECONDS
        except FileNotFoundError:  # released meanwhile
            return True

    def _in_use(self, holder: dict) -> str:
        who = "process {pid} on {host}, since {since}".format_map(
            {"pid": "unknown", "host": "unknown host", "since": "an unknown time", **holder}
        )
        return (
            f'another process builds this index ({who}; its lock is "{self.path}"): wait until it is done, '
            "or delete the lock if that process is gone"
        )


def _this_process() -> dict:
    """Return what tells this process from any other: process numbers are those of a host and a container."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")  # noqa: PTH115 - no file of that name exists
    except OSError:
        namespace = ""
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "namespace": namespace,
        "born": _birth(os.getpid()),
    }


def _birth(pid: int) -> str:
    """Return the start time of a process in ticks since the boot; empty where the system does not say."""
    try:
        # Behind the name, which is in brackets and may hold anything, it is the 20th value.
        return Path(f"/proc/{pid}/stat").read_text("ascii", "replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _lives(holder: dict) -> bool:
    pid = holder.get("pid")
    if not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        pass
    return holder.get("born") == _birth(pid)
