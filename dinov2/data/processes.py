"""What tells processes apart, on one machine and over several, and whether one still lives."""

import os
import socket
import time
from pathlib import Path


def this_process() -> dict:
    """Return what tells this process from any other, as plain values."""
    pid = os.getpid()
    return {
        "pid": pid,
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "machine": _machine(),
        "born": _birth(pid),
    }


def lives(recorded: dict) -> bool | None:
    """Return whether a process lives that :func:`this_process` once described; None if it is elsewhere."""
    if recorded.get("machine") != _machine():
        return None
    born = _birth(recorded.get("pid"))
    return born is not None and born == recorded.get("born")


def _machine() -> str:
    """Return the name of the space in which process numbers mean the same: a boot, and a container in it."""
    parts = [socket.gethostname()]
    try:
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip())
        parts.append(os.readlink("/proc/self/ns/pid"))  # noqa: PTH115 - no file of that name exists
    except OSError:
        pass
    return "/".join(parts)


def _birth(pid: object) -> str | None:
    """Return when a process started, None if there is none: numbers of processes are used again."""
    if not isinstance(pid, int):
        return None
    try:
        # Behind the name, which is in brackets and may hold anything, come the state and 18 more before it.
        fields = Path(f"/proc/{pid}/stat").read_text("ascii", "replace").rpartition(")")[2].split()
    except OSError:
        return "unknown" if not Path("/proc/self/stat").exists() and _exists(pid) else None
    return None if fields[0] in "ZX" else fields[19]  # a zombie has ended


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        pass
    return True
