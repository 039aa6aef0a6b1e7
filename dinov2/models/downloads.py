"""Weight files from the network, kept in a local cache.

The cache mirrors host and path of the address below ``$DINOV2_CACHE`` (default ``~/.cache/dinov2``), so a
file fetched by hand on another machine can be put where :func:`cache_path` says.
"""

import contextlib
import errno
import hashlib
import http.client
import logging
import os
import urllib.error
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from dinov2.errors import WeightsError
from dinov2.models.integrity import check_digest, is_file
from dinov2.models.transfer import discard, finish, transfer

logger = logging.getLogger("dinov2")

REMOTE_SCHEMES = ("http", "https")
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG}


class DownloadError(WeightsError):
    """The network or the server did not deliver a file; a local copy of it would do."""


def cache_dir() -> Path:
    """Return the folder for downloaded weights, which need not exist yet."""
    return Path(os.environ.get("DINOV2_CACHE") or Path.home() / ".cache" / "dinov2").expanduser()


def cache_path(url: str) -> Path:
    """Return where the file at ``url`` is, or would be, kept."""
    address = urllib.parse.urlsplit(url)
    parts = [part for part in urllib.parse.unquote(address.path).split("/") if part not in ("", ".", "..")]
    host = address.netloc.rpartition("@")[2].replace(":", "_")
    if not address.hostname or not parts or host in (".", "..") or "\0" in "".join(parts):
        raise WeightsError(
            f'"{url}" does not name a file: expected an address such as https://host/folder/file.pth'
        )
    if address.query:  # the same path with another query may be another file
        parts[-1] = f"{hashlib.sha256(address.query.encode()).hexdigest()[:12]}-{parts[-1]}"
    return cache_dir().joinpath(host, *parts)


def fetch(
    url: str,
    *,
    sha256: str | None = None,
    md5: str | None = None,
    target: Path | None = None,
    timeout: float = 10.0,
) -> Path:
    """Return the cached file of an http(s) address, downloading it the first time.

    Processes on one machine that ask at the same time wait for a single download. One that was interrupted is
    continued by the next call.

    Args:
        url: Address of the file.
        sha256: Expected checksum; compared before a download enters the cache and whenever it is used.
        md5: Expected checksum of the download, where a server states no better one.
        target: Where to keep the file, in place of :func:`cache_path`.
        timeout: Seconds to wait for the connection and for each block of data.

    Raises:
        DownloadError: The file could not be fetched.
        WeightsError: It has another checksum, or the cache cannot be written.
    """
    target = target or cache_path(url)
    if not is_file(target):
        with _exclusive(target) as partial:
            if not target.is_file():  # another process may have been faster
                _download(url, target, partial, sha256, md5, timeout)
                return target
    if sha256:
        check_digest(target, sha256, str(target))
    return target


def _download(
    url: str, target: Path, partial: Path, sha256: str | None, md5: str | None, timeout: float
) -> None:
    """Write the file beside ``target`` and move it there once it is complete and correct."""
    logger.info("downloading %s to %s", url, target)
    try:
        transfer(url, partial, timeout)
        for algorithm, expected in (("sha256", sha256), ("md5", md5)):
            if expected:
                check_digest(partial, expected, url, algorithm=algorithm)
        finish(partial, target)
    except WeightsError:
        discard(partial)
        raise
    except (OSError, http.client.HTTPException, ValueError) as error:
        if getattr(error, "errno", None) in DISK_ERRORS:
            raise _unwritable(target, error) from error
        raise DownloadError(
            f"Cannot download {url} ({_reason(error)}): fetch it on a machine with network access and give "
            f"the path of that copy instead, or put the copy at {target}."
        ) from error


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answers {error.code} {error.reason}"
    return str(getattr(error, "reason", error)) or type(error).__name__


def _unwritable(target: Path, error: OSError) -> WeightsError:
    return WeightsError(
        f"Cannot write weights to the cache folder {target.parent} ({error.strerror}): set the "
        "environment variable DINOV2_CACHE to a folder that can be written and has room."
    )


@contextlib.contextmanager
def _exclusive(target: Path) -> Iterator[Path]:
    """Hold a lock named after ``target`` against other processes, and yield the partial file to write."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = target.with_name(target.name + ".lock").open("w")
    except OSError as error:
        raise _unwritable(target, error) from error
    with lock:
        locked = _lock(lock, target)
        # Without locks every process downloads for itself, and the last rename wins.
        yield target.with_name(f"{target.name}.part" if locked else f"{target.name}.{os.getpid()}.part")


def _lock(lock: TextIO, target: Path) -> bool:
    """Wait for the lock; return whether this system and the cache's disk have such locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        logger.info("waiting for another process that downloads %s", target.name)
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError:
        return False
    return True
