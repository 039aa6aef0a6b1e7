"""From a local file to the dictionary inside it, safely.

Nothing here executes what a file contains: pickles are read with PyTorch's restricted unpickler, and records
of an archive are compared with their stored checksums before any of them is used. Where a file is from is
the business of :mod:`dinov2.models.sources`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov2.errors import WeightsError, some_of
from dinov2.models.digest import DIGEST_KEY
from dinov2.models.entries import leaves
from dinov2.models.integrity import check_sidecar, damaged, require_file
from dinov2.models.safetensors_files import list_safetensors
from dinov2.models.shards import INDEX_SUFFIX, NAMES_SHOWN, read_index
from dinov2.models.stored import StoredTensor
from dinov2.models.torch_files import read_archive, read_legacy
from dinov2.models.values import check_values

HEAD_BYTES = 512
MAX_DEPTH = 32  # containers within containers; a training checkpoint has about five
MAX_ENTRIES = 1_000_000  # a few megabytes of pickle can describe lists of lists without end

FOREIGN = {  # how files start that end up under the name of a weight file
    b"version https://git-lfs": "is a Git LFS pointer, not the file it points to: fetch it with git lfs pull",
    b"\x1f\x8b": "is a gzip archive: unpack it and name the weight file inside",
    b"\xfd7zXZ": "is an xz archive: unpack it and name the weight file inside",
    b"\x89HDF": "is an HDF5 file, neither a PyTorch nor a safetensors file: convert it first",
}


@dataclass(frozen=True)
class OpenedFile:
    """What a weight file holds.

    Attributes:
        path: The file, or the index of a checkpoint in several files.
        content: As it was saved, with a :class:`StoredTensor` for every tensor, none of which is read yet;
            its name is the path of keys to it, such as ``teacher.backbone.cls_token``.
        kind: ``safetensors``, ``sharded safetensors``, ``torch zip``, ``torch legacy`` or ``sharded torch``.
        metadata: The words that a safetensors file or an index carries beside the tensors. The digest of one
            file of several is under :data:`DIGEST_KEY` with a space and the file behind it.
    """

    path: Path
    content: dict[str, Any]
    kind: str
    metadata: dict[str, str] = field(default_factory=dict)


def open_file(path: Path) -> OpenedFile:
    """Read the table of contents of a weight file, or of all files that an index names.

    Raises:
        WeightsError: The file is unreadable, damaged, no weight file, or would execute code when loaded.
    """
    path = Path(path)
    if path.name.endswith(INDEX_SUFFIX):
        require_file(path)
        check_sidecar(path)
        return _open_sharded(path)
    return _open_single(path)


def read_file(path: Path) -> dict[str, Any]:
    """Return the dictionary stored in a weight file, with all its tensors, on the CPU.

    Tensors of a ``.pth`` archive are mapped from the file, not copied.

    Raises:
        WeightsError: See :func:`open_file`; or the values are damaged, see
            :func:`dinov2.models.values.check_values`.
    """
    opened = open_file(path)
    tensors = dict(leaves(opened.content))
    numbers = {name: stored for name, stored in tensors.items() if stored.is_floating_point}
    check_values(str(opened.path), numbers, tensors, opened.metadata)
    return _realised(opened.content)


def _open_single(path: Path) -> OpenedFile:
    head, size = _head_and_size(path)
    check_sidecar(path)
    metadata: dict[str, str] = {}
    if _is_safetensors(path, head):  # first, as every 32nd of its headers begins like a pickle
        kind = "safetensors"
        content, metadata = list_safetensors(path)
    elif head.startswith(b"PK\x03\x04"):
        kind, content = "torch zip", read_archive(path, size)
    elif head.startswith(b"\x80"):
        kind, content = "torch legacy", read_legacy(path)
    else:
        raise WeightsError(f'The weight file "{path}" {_what_it_is(head)}.')
    if not isinstance(content, Mapping):
        raise WeightsError(
            f'The weight file "{path}" holds a {type(content).__name__}: expected a dictionary of tensors.'
        )
    if kind != "safetensors":
        content = _Listing(path, size).of(content)
    return OpenedFile(path, dict(content), kind, metadata)


def _head_and_size(path: Path) -> tuple[bytes, int]:
    size = require_file(path)
    with path.open("rb") as stream:
        return stream.read(HEAD_BYTES), size


def _is_safetensors(path: Path, head: bytes) -> bool:
    """Whether a file starts with the length of a JSON table and the table, or should and is damaged."""
    cut_off = path.suffix == ".safetensors" and head != b"" and head[6:8] in (b"", b"\0\0")
    return head[8:9] == b"{" or cut_off


def _what_it_is(head: bytes) -> str:
    if not head:
        return "is empty: download or copy it again"
    for start, what in FOREIGN.items():
        if head.startswith(start):
            return what
    if head.lstrip().startswith(b"<"):
        return "is a web page saved under this name: download the file itself, signed in where needed"
    if b"pytorch" in head[:64]:  # an ONNX file names the program that wrote it near its beginning
        return "is an ONNX graph: name the weights that it was exported from"
    start = f"it starts with {head[:8]!r}"
    return f"is neither a PyTorch nor a safetensors file ({start}): download or copy it again"


def _open_sharded(index: Path) -> OpenedFile:
    table, metadata = read_index(index)
    shards = {file: _open_single(file) for file in dict.fromkeys(table.values())}
    lost = [name for name, file in table.items() if name not in shards[file].content]
    if lost:
        raise WeightsError(
            f'{len(lost)} tensors that "{index}" lists are not in the files it names for them '
            f"({some_of(lost, NAMES_SHOWN)}): index and files are of different checkpoints; "
            "download them again."
        )
    content = {name: shards[file].content[name] for name, file in table.items()}
    for file, shard in shards.items():  # what the index forgets is shown, not lost
        content = {**shard.content, **content}
        own = {f"{key} {file}" if key == DIGEST_KEY else key: value for key, value in shard.metadata.items()}
        metadata = {**own, **metadata}
    kinds = {shard.kind.partition(" ")[0] for shard in shards.values()}
    return OpenedFile(index, content, f"sharded {' and '.join(sorted(kinds))}", metadata)


class _Listing:
    """Turns the tensors in a dictionary of dictionaries and lists into stored ones."""

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size, self.entries = path, size, 0

    def of(self, item: Any, keys: tuple[str, ...] = ()) -> Any:
        self._count(keys)
        if isinstance(item, Tensor):
            return self._stored(item, ".".join(keys))
        if isinstance(item, Mapping):
            return {key: self.of(value, (*keys, str(key))) for key, value in item.items()}
        if isinstance(item, (list, tuple)):
            values = [self.of(value, (*keys, str(index))) for index, value in enumerate(item)]
            return values if isinstance(item, list) else tuple(values)
        return item

    def _count(self, keys: tuple[str, ...]) -> None:
        self.entries += 1
        if self.entries > MAX_ENTRIES or len(keys) > MAX_DEPTH:
            raise damaged(self.path, f"containers nested without end below {'.'.join(keys[:3])}")

    def _stored(self, tensor: Tensor, name: str) -> StoredTensor:
        plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not plain or tensor.is_quantized or tensor.is_nested:
            raise WeightsError(
                f'The tensor {name} of the weight file "{self.path}" has no plain values ({tensor.layout}, '
                f"device {tensor.device.type}, {tensor.dtype}): save dense tensors that have data."
            )
        stored = StoredTensor.of(tensor, name)
        if stored.nbytes > self.size:  # a view that repeats its few values, and would fill the memory
            raise damaged(self.path, f"{name} of shape {stored.shape} is larger than the file")
        return stored


def _realised(item: Any) -> Any:
    if isinstance(item, StoredTensor):
        return item.read()
    if isinstance(item, dict):
        return {key: _realised(value) for key, value in item.items()}
    if isinstance(item, (list, tuple)):
        return type(item)(_realised(value) for value in item)
    return item
