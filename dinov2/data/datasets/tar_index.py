"""Where the members of a tar archive lie, so that they can be read in place."""

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dinov2.errors import DatasetError

BLOCK_BYTES = tarfile.BLOCKSIZE
_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
}


class TarMember(NamedTuple):
    """A file in an archive: its name, its first byte and its length."""

    name: str
    offset: int
    size: int


class TruncatedTarError(DatasetError):
    """An archive breaks off; the members before the break have been handed out."""


def tar_members(path: str | Path) -> Iterator[TarMember]:
    """Yield the regular files of an archive in their order, reading headers only.

    Raises:
        TruncatedTarError: after the last complete member: the archive is cut off or damaged behind it.
        DatasetError: the file is compressed or is no tar archive.
    """
    total = Path(path).stat().st_size
    with Path(path).open("rb") as file:
        _refuse_compressed(path, file.read(6))
        file.seek(0)
        end = 0
        try:
            with tarfile.open(fileobj=file, mode="r:") as archive:
                while (member := archive.next()) is not None:
                    archive.members.clear()  # it would keep them all
                    end = member.offset_data + _whole_blocks(member.size if member.isreg() else 0)
                    if member.offset_data + member.size > total and member.isreg():
                        raise TruncatedTarError(_cut(path, total))
                    if member.issparse():
                        raise DatasetError(
                            f'"{path}" stores "{member.name}" with gaps (sparse), which can not be read in '
                            "place: write the archive without --sparse"
                        )
                    if member.isreg():
                        yield TarMember(member.name, member.offset_data, member.size)
        except tarfile.TarError as error:
            if end == 0 and total >= BLOCK_BYTES:
                raise DatasetError(
                    f'"{path}" is no tar archive ({error}): write shards as plain .tar'
                ) from error
            raise TruncatedTarError(_cut(path, min(end, total))) from error
        # The module ends in silence at a damaged header; a complete archive ends in blocks of zeros.
        file.seek(end)
        if file.read(BLOCK_BYTES) != bytes(BLOCK_BYTES):
            raise TruncatedTarError(_cut(path, end))


def member_name(header: bytes) -> str:
    """Return the name in the block in front of a member; names above 100 bytes come cut."""
    return header[:100].rstrip(b"\0").decode("utf-8", "replace")


def _whole_blocks(size: int) -> int:
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES


def _cut(path: str | Path, place: int) -> str:
    return f'the tar archive "{path}" breaks off or is damaged at byte {place}'


def _refuse_compressed(path: str | Path, first_bytes: bytes) -> None:
    for magic, (kind, command) in _COMPRESSED.items():
        if first_bytes.startswith(magic):
            raise DatasetError(
                f'"{path}" is compressed ({kind}), so single images can not be read from it: unpack it '
                f"once to a plain .tar with {command}; images are compressed already and do not grow"
            )
