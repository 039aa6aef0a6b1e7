"""Reading the tensors of a checkpoint folder: into given tensors, sharded or not, or whole.

PyTorch writes the index of a folder, ``.metadata``, as a pickle. It is read by an unpickler that knows the
few types of such an index and nothing else, so no folder can run code here.
"""

import io
import json
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from dinov2.errors import WeightsError
from dinov2.fsdp import layout
from dinov2.fsdp.encoding import decode
from dinov2.fsdp.layout import Manifest

# One process or one reader needs no group; PyTorch mentions it every time.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

_METADATA_TYPES = {
    "Metadata",
    "TensorStorageMetadata",
    "ChunkStorageMetadata",
    "TensorProperties",
    "MetadataIndex",
    "StorageMeta",
    "_MEM_FORMAT_ENCODING",
}
_ALLOWED = {
    *(("torch.distributed.checkpoint.metadata", name) for name in _METADATA_TYPES),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    *(("torch", str(value)[6:]) for value in vars(torch).values() if isinstance(value, torch.dtype)),
}


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


def read_index(folder: Path, manifest: Manifest) -> Metadata:
    """Read ``.metadata``: which tensors there are, and in which files their parts lie.

    Raises:
        WeightsError: it is damaged or holds something that does not belong there.
    """
    path = folder / layout.METADATA
    try:
        index = _IndexUnpickler(io.BytesIO(path.read_bytes())).load()
        assert isinstance(index, Metadata), "it is no index"
        for name, entry in index.state_dict_metadata.items():
            assert isinstance(entry, TensorStorageMetadata), f"{name} is no tensor"
        for place in index.storage_data.values():
            assert place.relative_path in manifest.files, f"{place.relative_path} is not in the manifest"
            assert not place.transform_descriptors, "its files are transformed"
    except Exception as error:  # whatever a damaged pickle makes of its types
        raise WeightsError(f"{path} can not be read safely ({' '.join(str(error).split())[:200]})") from error
    return index


def read_state(folder: Path) -> dict[str, Any]:
    """Read the text part, see :mod:`dinov2.fsdp.encoding`.

    Raises:
        WeightsError: it is no such text.
    """
    try:
        state = json.loads((folder / layout.STATE).read_bytes())
        state["objects"], state["extra"]  # noqa: B018 - a KeyError tells
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{folder / layout.STATE} can not be read ({error!r})") from error
    return state


class _Reader(dcp.FileSystemReader):
    """PyTorch's reader with an index that has been read safely."""

    def __init__(self, folder: Path, index: Metadata) -> None:
        super().__init__(folder)
        self._index = index

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        return self._index


def fill(folder: Path, index: Metadata, targets: Mapping[str, Tensor]) -> None:
    """Read into tensors of the stored shapes, in place; each process reads what its shards need.

    Raises:
        WeightsError: a file can not be read.
    """
    if not targets:
        return
    try:
        with torch.no_grad():
            dcp.load(
                dict(targets),
                storage_reader=_Reader(folder, index),
                planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
                no_dist=True,
            )
    except dcp.api.CheckpointException as failure:
        error, _ = next(iter(failure.failures.values()))
        raise WeightsError(f"{folder} can not be read ({' '.join(str(error).split())[:300]})") from failure


def blank(entry: TensorStorageMetadata) -> Tensor:
    """Return a tensor on the CPU to read a stored one into."""
    return torch.empty(entry.size, dtype=entry.properties.dtype)


def check(folder: Path) -> Manifest:
    """Compare all bytes of a checkpoint with its manifest, in this process alone.

    Raises:
        WeightsError: something is missing or has changed.
    """
    manifest = layout.read_manifest(folder)
    problem = layout.damage(folder, manifest, manifest.files)
    if problem:
        raise WeightsError(f"the checkpoint {problem}")
    return manifest


def read_checkpoint(folder: str | Path) -> dict[str, Any]:
    """Read a whole checkpoint folder into memory, on the CPU and in this process alone.

    Returns:
        ``model`` (name -> tensor), ``optimizer`` with parameters by name, the other objects of the run and
        what was stored beside them, such as ``iteration``.

    Raises:
        WeightsError: it is damaged, or no checkpoint.
    """
    folder = Path(folder)
    manifest = check(folder)
    index, state = read_index(folder, manifest), read_state(folder)
    tensors = {name: blank(entry) for name, entry in index.state_dict_metadata.items()}
    fill(folder, index, tensors)
    model = {name[len("model.") :]: value for name, value in tensors.items() if name.startswith("model.")}
    rest = {**state["objects"], **state["extra"]}
    return {"model": model, **{name: decode(value, tensors.__getitem__) for name, value in rest.items()}}
