"""One builder of an index at a time; the others are told who it is."""

from collections.abc import Iterator
from contextlib import contextmanager

from dinov2.data.locks import LockFile
from dinov2.errors import OutputError

# Longer than for other locks: a builder renews its own between slides, and not while it writes the index.
STALE_SECONDS = 900.0


@contextmanager
def only_builder(path: str) -> Iterator[LockFile]:
    """Hold the lock of an index while it is built.

    Raises:
        OutputError: another builder holds it, or its folder can not be written.
    """
    lock = LockFile(path, stale_seconds=STALE_SECONDS)
    if not lock.acquire():
        raise OutputError(
            f'another process builds this index ({lock.holder()}; its lock is "{path}"): wait until it is '
            "done, or delete the lock if that process is gone"
        )
    try:
        yield lock
    finally:
        lock.release()


def keep(lock: LockFile) -> None:
    """Show that this builder lives; cheap enough to be called all the time.

    Raises:
        OutputError: the lock is no longer ours.
    """
    if not lock.renew():
        raise OutputError(
            f'the lock "{lock.path}" was deleted or taken by another builder, so this one stops: run it '
            "again when the other is done; what it has listed is kept"
        )
