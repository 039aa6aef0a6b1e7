"""What a process writes of a checkpoint, copied to the CPU so that training can go on meanwhile."""

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.tensor import DTensor

from dinov2 import distributed


@dataclass(frozen=True)
class Piece:
    """One process's part of a tensor.

    Attributes:
        data: the part, on the CPU.
        offsets: where it begins in the whole tensor.
        size: of the whole tensor.
    """

    data: Tensor
    offsets: torch.Size
    size: torch.Size


class Stage:
    """Copies of tensors on the CPU. Their memory, pinned for CUDA, is kept for the next time."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copy(self, tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Piece]:
        """Return what this process has to write; the pieces of the call before are overwritten.

        Args:
            tensors: the same names on all processes, sharded or equal everywhere: each part is written once.
            own: tensors that only this process has.
        """
        sources = dict(_share(tensors))
        sources.update((name, (tensor, _whole(tensor))) for name, tensor in own.items())
        self._buffers = {name: buffer for name, buffer in self._buffers.items() if name in sources}
        pieces = {
            name: Piece(self._copied(name, local), chunk.offsets, size)
            for name, (local, (chunk, size)) in sources.items()
        }
        if any(local.is_cuda for local, _ in sources.values()):
            torch.cuda.current_stream().synchronize()
        return pieces

    def _copied(self, name: str, source: Tensor) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != source.shape or buffer.dtype != source.dtype:
            buffer = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
            self._buffers[name] = buffer
        return buffer.copy_(source, non_blocking=True)


Part = tuple[Tensor, tuple[ChunkStorageMetadata, torch.Size]]


def _share(tensors: Mapping[str, Tensor]) -> Iterable[tuple[str, Part]]:
    """Yield the local parts that this process writes, with their places in the whole tensors."""
    replicated = {name: value for name, value in tensors.items() if not isinstance(value, DTensor)}
    owners = _owners({name: value.nbytes for name, value in replicated.items()})
    rank = distributed.get_global_rank()
    for name, tensor in tensors.items():
        if not isinstance(tensor, DTensor):
            if owners[name] == rank:
                yield name, (tensor, _whole(tensor))
        elif _writes_shard(tensor, name):
            (chunk,) = tensor.__create_chunk_list__()
            if tensor.to_local().numel():  # a shard may have no rows
                yield name, (tensor.to_local(), (chunk, tensor.shape))


def _whole(tensor: Tensor) -> tuple[ChunkStorageMetadata, torch.Size]:
    return ChunkStorageMetadata(torch.Size([0] * tensor.dim()), tensor.shape), tensor.shape


def _owners(sizes: Mapping[str, int]) -> dict[str, int]:
    """Deal tensors that every process has out to the processes, so that all write about as much."""
    loads = [0] * distributed.get_global_size()
    owners = {}
    for name, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += size
    return owners


def _writes_shard(tensor: DTensor, name: str) -> bool:
    """Of the groups of processes that hold equal shards, one writes a tensor; its name decides which."""
    place = tensor.device_mesh.get_coordinate()
    if place is None:
        return False
    dimensions = zip(place, tensor.device_mesh.shape, tensor.placements, strict=True)
    turn = zlib.crc32(name.encode())
    return all(
        coordinate == turn % groups
        for coordinate, groups, placement in dimensions
        if placement.is_replicate()
    )


class StagedPlanner(DefaultSavePlanner):
    """Writes pieces, where PyTorch's planner wants live tensors; the state given to ``save`` stays empty.

    Args:
        pieces: of this process, by name.
    """

    def __init__(self, pieces: Mapping[str, Piece]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.pieces = pieces

    def set_up_planner(
        self, state_dict: Mapping[str, Any], storage_meta: Any = None, is_coordinator: bool = False
    ) -> None:
        """Begin."""
        self.is_coordinator = is_coordinator

    def create_local_plan(self) -> SavePlan:
        """Plan to write every piece."""
        self.plan = SavePlan([_item(name, piece) for name, piece in self.pieces.items()])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """Return the data of a piece."""
        return self.pieces[index.fqn].data


def _item(name: str, piece: Piece) -> WriteItem:
    chunk = ChunkStorageMetadata(piece.offsets, piece.data.shape)
    properties = TensorProperties(dtype=piece.data.dtype)
    return WriteItem(
        index=MetadataIndex(name, piece.offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(chunk, properties, piece.size),
    )
