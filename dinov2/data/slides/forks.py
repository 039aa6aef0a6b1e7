"""Closes what must not be shared before a process forks: parent and child would move one file position."""

import os
import threading
import weakref
from typing import Protocol


class Closable(Protocol):
    """Something that can be closed and opens itself again when it is used; ``lock`` guards both."""

    lock: threading.RLock

    def close(self) -> None: ...


_open: "weakref.WeakSet[Closable]" = weakref.WeakSet()
_registry_lock = threading.RLock()
_held: list[threading.RLock] = []


def close_before_fork(item: Closable) -> None:
    """Have an object closed whenever this process is about to fork, until it is gone."""
    with _registry_lock:
        _open.add(item)


def _before() -> None:
    _registry_lock.acquire()
    for item in list(_open):
        # The lock is kept over the fork, so no thread opens the file again in between.
        item.lock.acquire()
        _held.append(item.lock)
        item.close()


def _after() -> None:
    while _held:
        _held.pop().release()
    _registry_lock.release()


os.register_at_fork(before=_before, after_in_parent=_after, after_in_child=_after)
