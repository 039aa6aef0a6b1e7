"""Open files and decoded blocks that a process keeps at hand, never shared with its children."""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

from dinov2.errors import ImageReadError


def _one(_: Any) -> int:
    return 1


class ProcessCache:
    """The most recently used values of this process; a forked or spawned process begins with none.

    Args:
        limit: most that the values may weigh together; the latest is kept whatever it weighs.
        weigh: value -> its weight; by default values are counted.
    """

    def __init__(self, limit: int, weigh: Callable[[Any], int] = _one) -> None:
        self._limit = limit
        self._weigh = weigh
        self._begin()

    def __getstate__(self) -> dict:
        return {"limit": self._limit, "weigh": self._weigh}

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Hashable, make: Callable[[Any], Any]) -> Any:
        """Return the value of a key, from ``make(key)`` if it is not at hand."""
        if self._process != os.getpid():
            # Whatever a parent had open, and a lock that one of its threads held, are of no use here.
            self._begin()
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
            value = make(key)
            self._values[key] = value
            self._weight += self._weigh(value)
            while self._weight > self._limit and len(self._values) > 1:
                self._weight -= self._weigh(self._values.popitem(last=False)[1])
            return value

    def _begin(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._values: OrderedDict[Hashable, Any] = OrderedDict()
        self._weight = 0


class OpenFile:
    """A file that is read at any place; closed when nobody refers to it any more.

    Reading moves no file position, so threads may share one.
    """

    def __init__(self, path: str) -> None:
        self._descriptor = -1
        self._path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def read(self, offset: int, size: int) -> bytes:
        """Return ``size`` bytes from ``offset`` on.

        Raises:
            ImageReadError: the file ends before.
        """
        data = os.pread(self._descriptor, size, offset)
        while len(data) < size:
            more = os.pread(self._descriptor, size - len(data), offset + len(data))
            if not more:
                raise ImageReadError(
                    f'"{self._path}" ends at byte {offset + len(data)}, but an image reaches to byte '
                    f"{offset + size}: it was cut off after it was indexed, copy it again"
                )
            data += more
        return data
