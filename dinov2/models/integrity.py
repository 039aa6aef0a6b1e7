"""Whether a weight file is whole: checksums, and the sentence for a damaged one."""

import hashlib
import re
import stat
from pathlib import Path

from dinov2.errors import WeightsError

CHUNK_BYTES = 1 << 20
SIDECAR_BYTES = 1 << 20  # a list of checksums is never longer


def is_file(path: Path) -> bool:
    """Whether there is such a file; False for a name that no file can have, where :mod:`pathlib` raises."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def require_file(path: Path) -> int:
    """Return the size of a file in bytes; anything but a readable file is an error.

    Raises:
        WeightsError: It does not exist, may not be read, or is a folder, pipe or device.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # to open a pipe would wait for its other end
            what = "a folder" if stat.S_ISDIR(status.st_mode) else "a device or pipe"
            raise WeightsError(f'"{path}" is {what}, not a weight file: name a file.')
        with path.open("rb"):
            return status.st_size
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise WeightsError(
            f'The weight file "{path}" cannot be read ({reason}): check its name and permissions.'
        ) from error


def digest_of(path: Path, algorithm: str) -> str:
    """Return a checksum of a file in hexadecimal digits; ``algorithm`` is one of ``hashlib``."""
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with path.open("rb") as stream:
        while block := stream.read(CHUNK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    return digest_of(path, "sha256")


def check_digest(path: Path, expected: str, origin: str, *, algorithm: str = "sha256") -> None:
    """Raise :class:`WeightsError` unless the file has the expected checksum.

    Args:
        path: The file to check.
        expected: Checksum in hexadecimal digits, or the first digits of it.
        origin: Where the file is from, for the message.
        algorithm: ``sha256``, or ``md5`` where a server states no other.
    """
    found = digest_of(path, algorithm)
    if not found.startswith(expected.lower()):
        raise WeightsError(
            f"The file from {origin} has {algorithm} {found} instead of the expected {expected} and is not "
            "used: check which of the two is right, and download or copy the file again if it is damaged."
        )


def check_sidecar(path: Path) -> None:
    """Compare a file with ``<file>.sha256`` beside it, if there is one, as ``sha256sum`` writes it.

    Raises:
        WeightsError: The checksums differ, or the list has none for this file.
    """
    sidecar = path.with_name(f"{path.name}.sha256")
    if not sidecar.is_file():
        return
    with sidecar.open("rb") as stream:
        lines = stream.read(SIDECAR_BYTES).decode("ascii", "replace").splitlines()
    entries = [re.fullmatch(r"\\?([0-9a-fA-F]{64})(?:\s+\*?(.+))?", line.strip()) for line in lines]
    digests = [
        entry[1] for entry in entries if entry and (entry[2] is None or Path(entry[2]).name == path.name)
    ]
    if len(digests) != 1:
        raise WeightsError(
            f'"{sidecar}" has {len(digests)} checksums for {path.name}, expected is one line '
            f'"<64 hexadecimal digits>  {path.name}": write it with sha256sum, or remove it.'
        )
    check_digest(path, digests[0], f"{path} (checksum in {sidecar.name})")


def damaged(path: Path, error: Exception | str) -> WeightsError:
    """Return the sentence for a file whose content contradicts itself."""
    reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
    return WeightsError(
        f'The weight file "{path}" is cut off or damaged ({reason[:120]}): download or copy it again.'
    )
