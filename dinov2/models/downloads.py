"""Weight files from the network, kept in a local cache.

The cache mirrors host and path of the address below ``$DINOV2_CACHE`` (default ``~/.cache/dinov2``), so a
file fetched by hand on another machine can be put where :func:`cache_path` says.
"""

import contextlib
import hashlib
import http.client
import logging
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from dinov2.errors import WeightsError
from dinov2.models.integrity import CHUNK_BYTES, check_digest

logger = logging.getLogger("dinov2")

REMOTE_SCHEMES = ("http", "https")


class DownloadError(WeightsError):
    """The network or the server did not deliver a file; a local copy of it would do."""


def cache_dir() -> Path:
    """Return the folder for downloaded weights, which need not exist yet."""
    return Path(os.environ.get("DINOV2_CACHE") or Path.home() / ".cache" / "dinov2").expanduser()


def cache_path(url: str) -> Path:
    """Return where the file at ``url`` is, or would be, kept."""
    address = urllib.parse.urlsplit(url)
    parts = [part for part in urllib.parse.unquote(address.path).split("/") if part not in ("", ".", "..")]
    if not address.hostname or not parts:
        raise WeightsError(
            f'"{url}" does not name a file: expected an address such as https://host/folder/file.pth'
        )
    if address.query:  # the same path with another query may be another file
        parts[-1] = f"{hashlib.sha256(address.query.encode()).hexdigest()[:12]}-{parts[-1]}"
    return cache_dir().joinpath(address.netloc.rpartition("@")[2].replace(":", "_"), *parts)


def fetch(url: str, *, sha256: str | None = None, timeout: float = 10.0) -> Path:
    """Return the cached file of an http(s) address, downloading it the first time.

    Processes on one machine that ask at the same time wait for a single download.

    Args:
        url: Address of the file.
        sha256: Expected checksum; checked once, before a download enters the cache.
        timeout: Seconds to wait for the connection and for each block of data.

    Raises:
        DownloadError: The file could not be fetched.
        WeightsError: It has another checksum, or the cache cannot be written.
    """
    target = cache_path(url)
    if target.is_file():
        return target
    with _exclusive(target):
        if not target.is_file():  # another process may have been faster
            _download(url, target, sha256, timeout)
    return target


def _download(url: str, target: Path, sha256: str | None, timeout: float) -> None:
    """Write the file beside ``target`` and move it there once it is complete and correct."""
    partial = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response:
            expected_bytes = int(response.headers.get("Content-Length") or 0)
            logger.info("downloading %s (%.0f MB) to %s", url, expected_bytes / 1e6, target)
            with partial.open("wb") as stream:
                while block := response.read(CHUNK_BYTES):
                    stream.write(block)
        received_bytes = partial.stat().st_size
        if expected_bytes and received_bytes != expected_bytes:
            raise http.client.IncompleteRead(b"", expected_bytes - received_bytes)
        if sha256:
            check_digest(partial, sha256, url)
        partial.replace(target)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise DownloadError(
            f"Cannot download {url} ({_reason(error)}): fetch it on a machine with network access and give "
            f"the path of that copy instead, or put the copy at {target}."
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answers {error.code} {error.reason}"
    return str(getattr(error, "reason", error)) or type(error).__name__


@contextlib.contextmanager
def _exclusive(target: Path) -> Iterator[None]:
    """Hold a lock named after ``target`` against other processes, where the system has file locks."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = target.with_name(target.name + ".lock").open("w")
    except OSError as error:
        raise WeightsError(
            f"Cannot write weights to the cache folder {target.parent} ({error.strerror}): set the "
            "environment variable DINOV2_CACHE to a folder that can be written."
        ) from error
    with lock:
        try:
            import fcntl
        except ImportError:  # Windows: every process downloads for itself, and the last rename wins
            pass
        else:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
