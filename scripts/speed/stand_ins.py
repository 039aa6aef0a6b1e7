"""What DINOv2's own training code needs to run in one process without FSDP and xFormers' compiled kernels.

Used by ``bench_train.py --against`` alone, in the process that times such a checkout. Its files stay as they
are. Put in place are:

- the parts of ``xformers.ops`` that it imports: attention over packed sequences by PyTorch's own kernel, one
  call per run of equal sequences, and indexing by ``index_select`` and ``index_add``; xFormers' fused
  cross-entropy and SwiGLU stay absent, for which the code has its own replacements;
- ``Tensor.cuda``, which leads to the CPU where the step runs there;
- a process group of one, which its iBOT loss reduces over without asking;
- the FSDP wrapper and its gradient scaler, which are left out: the teacher is given the student's weights,
  and its update sees the parameters as they are.
"""

import sys
import types
from collections.abc import Sequence
from itertools import groupby
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


class BlockDiagonalMask:
    """Keeps packed sequences apart, as xFormers' class of that name: here only their lengths."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = list(lengths)
        self._batch_sizes: Sequence[int] | None = None  # set by the code that packs batches

    @classmethod
    def from_seqlens(cls, lengths: Sequence[int]) -> "BlockDiagonalMask":
        """Take the lengths of the sequences, in tokens."""
        return cls(lengths)

    @classmethod
    def from_tensor_list(cls, tensors: Sequence[Tensor]) -> tuple["BlockDiagonalMask", Tensor]:
        """Pack batches ``[b, n, ...]`` into one ``[1, T, ...]``."""
        mask = cls([tensor.shape[1] for tensor in tensors for _ in range(tensor.shape[0])])
        mask._batch_sizes = [tensor.shape[0] for tensor in tensors]
        return mask, torch.cat([tensor.reshape(1, -1, *tensor.shape[2:]) for tensor in tensors], dim=1)

    def split(self, packed: Tensor) -> list[Tensor]:
        """Undo the packing: ``[1, T, ...]`` into ``[b, n, ...]`` of each batch."""
        batches, start = [], 0
        for size in self._batch_sizes or [1] * len(self.lengths):
            batches.append((size, self.lengths[start]))
            start += size
        parts = packed.split([size * length for size, length in batches], dim=1)
        shapes = zip(parts, batches, strict=True)
        return [part.reshape(size, length, *packed.shape[2:]) for part, (size, length) in shapes]


def memory_efficient_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_bias: BlockDiagonalMask | None = None, op: Any = None
) -> Tensor:
    """Attend within each sequence; all tensors ``[B, N, H, E]``, or packed with B = 1."""
    runs = [(q.shape[0], q.shape[1])]
    if attn_bias is not None:
        runs = [(len(list(run)), length) for length, run in groupby(attn_bias.lengths)]
    flat = [tensor.flatten(0, 1).split([count * length for count, length in runs]) for tensor in (q, k, v)]
    mixed = []
    for (count, length), parts in zip(runs, zip(*flat, strict=True), strict=True):
        heads = (part.unflatten(0, (count, length)).transpose(1, 2) for part in parts)
        mixed.append(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(0, 1))
    return torch.cat(mixed).view_as(q)


def index_select_cat(sources: Sequence[Tensor], indices: Sequence[Tensor]) -> Tensor:
    """Select rows of each source ``[b, n]`` and lay them end to end."""
    return torch.cat([source[index].flatten() for source, index in zip(sources, indices, strict=True)])


def scaled_index_add(x: Tensor, index: Tensor, source: Tensor, scaling: Tensor, alpha: float = 1.0) -> Tensor:
    """Return ``x`` with ``alpha * scaling * source`` added to its rows ``index``."""
    return torch.index_add(x, 0, index, (source * scaling).to(x.dtype), alpha=alpha)


def before_import(device: torch.device) -> None:
    """Put in place what is needed to import the code."""
    ops = types.ModuleType("xformers.ops")
    ops.fmha = SimpleNamespace(
        BlockDiagonalMask=BlockDiagonalMask, MemoryEfficientAttentionFlashAttentionOp=None
    )
    ops.memory_efficient_attention = memory_efficient_attention
    ops.index_select_cat, ops.scaled_index_add = index_select_cat, scaled_index_add
    ops.unbind = torch.unbind
    package = types.ModuleType("xformers")
    package.ops = ops
    sys.modules["xformers"], sys.modules["xformers.ops"] = package, ops
    if device.type == "cpu":
        torch.Tensor.cuda = lambda tensor, non_blocking=False: tensor.to(device, non_blocking=non_blocking)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def after_import(model: torch.nn.Module) -> None:
    """Make a built ``SSLMetaArch`` ready to train without FSDP."""
    module = sys.modules[type(model).__module__]
    module.get_fsdp_modules = lambda network: [SimpleNamespace(params=list(network.parameters()))]
    module.reshard_fsdp_model = lambda network: None
    model.fp16_scaler = None
    model.need_to_synchronize_fsdp_streams = False
    for name, network in model.student.items():
        model.teacher[name].load_state_dict(network.state_dict())
