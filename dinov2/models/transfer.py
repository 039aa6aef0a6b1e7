"""One file over HTTP, in as many attempts as it takes.

What has arrived stays in a partial file, and beside it the server's mark for this version of the file (ETag
or date). The next attempt, also of a later process, asks for the rest under the condition that the mark is
still the same, and starts afresh otherwise.
"""

import contextlib
import errno
import http.client
import json
import logging
import re
import shutil
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from dinov2.models.integrity import CHUNK_BYTES
from dinov2.models.progress import Progress

logger = logging.getLogger("dinov2")

ATTEMPTS = 4  # in a row without a new byte
PAUSE_SECONDS = 1.0  # before the second attempt; doubled before each further one
PASSING_STATUS = {408, 429, 500, 502, 503, 504}
DROPPED = (ConnectionError, TimeoutError, http.client.HTTPException, ssl.SSLError, urllib.error.URLError)


def transfer(url: str, partial: Path, timeout: float) -> None:
    """Bring the file at ``url`` to ``partial``, continuing what is there.

    After an error the partial file remains if a later call can continue it, and is removed otherwise.

    Args:
        url: An http or https address.
        partial: The file to write; nobody else may write it meanwhile.
        timeout: Seconds to wait for the connection and for each block of data.

    Raises:
        OSError, http.client.HTTPException: What the last attempt met.
        ValueError: The server sends something that is no file.
    """
    failures, most, received = 0, _size(partial), False
    try:
        while True:
            try:
                return _attempt(url, partial, timeout)
            except DROPPED as error:
                arrived = _size(partial)
                failures = 0 if arrived > most else failures + 1
                received, most = received or arrived > 0, max(most, arrived)
                if failures >= ATTEMPTS or not _may_pass(error, received):
                    raise
                pause = PAUSE_SECONDS * 2 ** max(failures - 1, 0)
                logger.info("the download of %s stopped (%s), next attempt in %g s", url, error, pause)
                time.sleep(pause)
    except BaseException:
        if not _mark_file(partial).is_file():
            partial.unlink(missing_ok=True)
        raise


def discard(partial: Path) -> None:
    """Remove a partial file and the mark beside it."""
    partial.unlink(missing_ok=True)
    _mark_file(partial).unlink(missing_ok=True)


def finish(partial: Path, target: Path) -> None:
    """Give a complete file its name."""
    partial.replace(target)
    _mark_file(partial).unlink(missing_ok=True)


def _may_pass(error: Exception, received: bool) -> bool:
    """Whether the same request may succeed a moment later."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code in PASSING_STATUS
    if isinstance(error, urllib.error.URLError):  # no connection: no network, unless there was one before
        return received
    return True


def _attempt(url: str, partial: Path, timeout: float) -> None:
    request = urllib.request.Request(url, headers={"User-Agent": "dinov2", "Accept-Encoding": "identity"})
    mark = _read_mark(partial, url)
    start = _size(partial) if mark else 0
    if mark and start:
        request.add_header("Range", f"bytes={start}-")
        request.add_header("If-Range", mark)
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code == 416 and start:
            discard(partial)
            raise ConnectionError("the server has no such part of the file") from error
        raise
    with response:
        if response.status == 206 and not _continues(response, start, mark):
            discard(partial)
            raise ConnectionError("the server sent another part of the file, or of another version of it")
        _receive(response, url, partial, start if response.status == 206 else 0)


def _receive(response: http.client.HTTPResponse, url: str, partial: Path, start: int) -> None:
    """Append the body of a response to the first ``start`` bytes of the partial file."""
    total = None if response.length is None else start + response.length
    if total and total - start > shutil.disk_usage(partial.parent).free:
        raise OSError(errno.ENOSPC, f"{(total - start) / 1e9:.1f} GB more do not fit on the disk")
    block = response.read1(CHUNK_BYTES)
    if not start and re.match(rb"\s*<(!doctype html|html)\b", block[:512], re.IGNORECASE):
        raise ValueError("the server sends a web page instead of a file; it may ask for a login")
    name = urllib.parse.unquote(url.partition("?")[0].rpartition("/")[2])
    with partial.open("ab" if start else "wb") as stream, Progress(name, start, total) as progress:
        if not start:  # only now, when the old bytes are gone, may the mark be that of the new ones
            _write_mark(partial, url, response)
        while block:
            stream.write(block)
            progress.advance(len(block))
            block = response.read1(CHUNK_BYTES)
    received = _size(partial)
    if total is not None and received != total:
        raise http.client.IncompleteRead(b"", total - received)


def _continues(response: http.client.HTTPResponse, start: int, mark: str | None) -> bool:
    """Whether a partial response is the rest of what is there."""
    sent = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return sent is not None and int(sent[1]) == start and _mark_of(response) in (mark, None)


def _mark_of(response: http.client.HTTPResponse) -> str | None:
    """Return what tells this version of the file from others; a weak ETag does not."""
    tag = response.headers.get("ETag")
    return tag if tag and not tag.startswith("W/") else response.headers.get("Last-Modified")


def _mark_file(partial: Path) -> Path:
    return partial.with_name(f"{partial.name}.json")


def _write_mark(partial: Path, url: str, response: http.client.HTTPResponse) -> None:
    mark = _mark_of(response)
    if mark:
        _mark_file(partial).write_text(json.dumps({"url": url, "mark": mark}))
    else:
        _mark_file(partial).unlink(missing_ok=True)


def _read_mark(partial: Path, url: str) -> str | None:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        content = json.loads(_mark_file(partial).read_text())
        if content.get("url") == url and isinstance(content.get("mark"), str):
            return content["mark"]
    return None


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
