"""Counts what a computation asks of the device, without a clock: the same on every machine and every day.

    with count() as counts:
        train_step(...)

Counted are PyTorch's operators as they reach a backend, the backward pass included:

- operators: all that compute or copy; views and allocations do not count. On a GPU most launch one kernel.
- floating-point operations of matrix products, convolutions and attention, by PyTorch's own counter.
- bytes: what the other operators, elementwise ones and reductions, read and write at least, each distinct
  tensor once. A kernel of several passes counts as one, and what the caches save is not known here.
- memory bytes, if a size of cache is given: what all operators move between the memory and a cache that holds
  whole tensors or parts of them, the latest used; what is freed before it had to leave is never written.
- waits: places where the host must wait for the device to know a value or a size. On a CPU nothing waits,
  so they are found by what would: reading values (``item``, ``tolist``, ``if tensor``), results whose size
  depends on values (``nonzero``, boolean indexing), copies from ordinary memory to the device.
- copies to the device: of tensors named as lying in the host's memory, and of numbers made into tensors.

Compiled code and hand-written kernels are not seen. This module knows nothing of the package, so that
``bench_train.py --against`` can count in any checkout.
"""

import traceback
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import (
    FlopCounterMode,
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

# Neither compute nor copy, though PyTorch does not call them views.
_FREE = {"_unsafe_view", "_reshape_alias", "empty", "empty_like", "empty_strided", "new_empty"}
_FREE |= {"new_empty_strided", "lift_fresh", "detach", "alias", "set_", "resize_", "_local_scalar_dense"}
_ONLY_WRITE = {
    "copy_",
    "zero_",
    "fill_",
    "_foreach_zero_",
    "_foreach_copy_",
    "normal_",
    "uniform_",
    "random_",
}
_SHAPED_LIKE = {"zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"}  # read nothing
# Of their first argument they touch only what their result, or what is added to it, has.
_GATHER = {"index_select", "index", "gather", "embedding"}
_SCATTER = {"index_add_", "index_put_", "_index_put_impl_", "scatter_", "scatter_add_"}
_SIZES_FROM_VALUES = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount"}
_READS_A_VALUE = {"_local_scalar_dense", "equal", "is_nonzero"}
_READS_VALUES = {"tolist", "numpy", "cpu", "__array__"}  # calls that reach no operator on a CPU
_MAKES_A_TENSOR = {"tensor", "as_tensor", "new_tensor"}


def _attention_flops(q, k, v, *args, out_shape=None, **kwargs) -> int:
    return sdpa_flop_count(q, k, v)


def _attention_backward_flops(grad_out, q, k, v, *args, out_shape=None, **kwargs) -> int:
    return sdpa_backward_flop_count(grad_out, q, k, v)


# PyTorch's counter knows the kernels of GPUs alone.
_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


@dataclass(frozen=True)
class Event:
    """Something that happened at a line of the code that is counted."""

    what: str
    where: str  # "folder/file.py:line function"
    bytes: int = 0

    def __str__(self) -> str:
        return f"{self.what} at {self.where}"


@dataclass
class Counts:
    """What was counted; complete once the context has ended."""

    flops: int = 0
    operators: Counter[str] = field(default_factory=Counter)  # by name
    bytes_by_operator: Counter[str] = field(default_factory=Counter)  # of all but matrix products
    product_bytes: int = 0  # of matrix products, convolutions and attention
    memory_bytes: int = 0  # of all operators, beyond a cache; 0 if none was given
    waits: list[Event] = field(default_factory=list)
    copies: list[Event] = field(default_factory=list)

    @property
    def launches(self) -> int:
        """Number of operators."""
        return self.operators.total()

    @property
    def bytes(self) -> int:
        """Bytes that elementwise operators, reductions and copies read and write."""
        return self.bytes_by_operator.total()

    def as_json(self) -> dict[str, Any]:
        """Return the totals, and the operators that move most."""
        return {
            "flops": self.flops,
            "operators": self.launches,
            "elementwise_bytes": self.bytes,
            "product_bytes": self.product_bytes,
            "waits": [str(event) for event in self.waits],
            "copies_to_device": len(self.copies),
            "copied_bytes": sum(event.bytes for event in self.copies),
            "most_bytes": dict(self.bytes_by_operator.most_common(10)),
        }


@contextmanager
def count(host: Iterable[Tensor] = (), *, cache_bytes: int = 0) -> Iterator[Counts]:
    """Count what happens inside the ``with``.

    Args:
        cache_bytes: size of the cache of ``memory_bytes``.
        host: tensors that lie in the host's memory whatever the device, such as a batch from the loader and
            the optimizer's step counters. Reading them is no wait, and moving them is a copy to the device.
    """
    counts = Counts()
    addresses = {tensor.untyped_storage().data_ptr() for tensor in host} - {0}
    flops = FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION)
    cache = _Cache(cache_bytes) if cache_bytes else None
    with flops, _Operators(counts, addresses, cache), _Calls(counts, addresses):
        yield counts
    counts.flops = flops.get_total_flops()
    counts.memory_bytes = cache.flush() if cache else 0


def host_tensors(batch: dict[str, Any], optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return the tensors of a training step that a GPU run keeps in the host's memory."""
    counters = [state["step"] for state in optimizer.state.values() if "step" in state]
    return [tensor for tensor in (*batch.values(), *counters) if isinstance(tensor, Tensor)]


def used_bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor's distinct elements; a broadcast one has few."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride or not size else 1
    return elements * tensor.element_size()


def where() -> str:
    """Name the line that is counted: the innermost one outside PyTorch and this module."""
    torch_folder = str(Path(torch.__file__).parent)
    for frame in reversed(traceback.extract_stack()):
        if frame.filename != __file__ and not frame.filename.startswith((torch_folder, "<")):
            return f"{'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno} {frame.name}"
    return "?"


class _Operators(TorchDispatchMode):
    """Sees every operator on its way to a backend."""

    def __init__(self, counts: Counts, host: set[int], cache: "_Cache | None") -> None:
        super().__init__()
        self.counts, self.host, self.cache = counts, host, cache

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        tensors = _tensors((args, kwargs))
        if self._waits(name, tensors, args):
            self.counts.waits.append(Event(name, where()))
        if not (func.is_view or name in _FREE or "::" in name):
            self.counts.operators[name] += 1
            moved = _moved(func, name, args, tensors, _tensors(result))
            if self.cache is not None:
                self.cache.use(tensors, [*_mutated(func, args), *_tensors(result)])
            if func.overloadpacket in flop_registry or func.overloadpacket in _CPU_ATTENTION:
                self.counts.product_bytes += moved
            else:
                self.counts.bytes_by_operator[name] += moved
        return result

    def _waits(self, name: str, tensors: list[Tensor], args: tuple) -> bool:
        if self.host and all(tensor.untyped_storage().data_ptr() in self.host for tensor in tensors):
            return False
        if name in ("index", "index_put_", "_index_put_impl_"):
            return any(index is not None and index.dtype == torch.bool for index in args[1])
        if name == "repeat_interleave":
            return isinstance(args[-1], Tensor)
        return name in _SIZES_FROM_VALUES or name in _READS_A_VALUE


class _Cache:
    """A cache of the latest used parts of tensors, and what passes between it and the memory.

    A part is what one operator uses at a time; parts that overlap count as different ones.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.held: OrderedDict[tuple, tuple[int, StorageWeakRef, bool]] = OrderedDict()  # bytes, dirty
        self.used = 0
        self.moved = 0

    def use(self, read: list[Tensor], written: list[Tensor]) -> None:
        for tensor, dirties in (*((t, False) for t in read), *((t, True) for t in written)):
            size, storage = used_bytes(tensor), tensor.untyped_storage()
            key = (storage._cdata, tensor.storage_offset(), size)
            old = self.held.pop(key, None)
            if old is None:
                self.used += size
                self.moved += 0 if dirties else size
            self.held[key] = (size, StorageWeakRef(storage), dirties or (old is not None and old[2]))
        if self.used > self.size:
            self._drop_freed()
        while self.used > self.size:
            self._evict()

    def _drop_freed(self) -> None:
        for key in [key for key, (_, storage, _) in self.held.items() if storage.expired()]:
            self.used -= self.held.pop(key)[0]

    def _evict(self) -> None:
        _, (size, _, dirty) = self.held.popitem(last=False)
        self.used -= size
        self.moved += size if dirty else 0

    def flush(self) -> int:
        """Write what is still to be written and return the bytes moved in all."""
        self._drop_freed()
        while self.held:
            self._evict()
        return self.moved


class _Calls(TorchFunctionMode):
    """Sees calls that reach no operator on a CPU, but would copy or wait on a GPU."""

    def __init__(self, counts: Counts, host: set[int]) -> None:
        super().__init__()
        self.counts, self.host = counts, host

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        subject = args[0] if args and isinstance(args[0], Tensor) else None
        on_host = bool(self.host) and subject is not None
        on_host = on_host and subject.untyped_storage().data_ptr() in self.host
        if name in _READS_VALUES and not on_host:
            self.counts.waits.append(Event(name, where()))
        # The literal "cpu", as in AdamW's step counters, means the host on every machine.
        if name in _MAKES_A_TENSOR and (subject is not None or kwargs.get("device") not in (None, "cpu")):
            self._copy(Event(name, where(), _number_bytes(args, kwargs)), waits=True)
        if on_host and (name == "cuda" or (name == "to" and _names_a_device(args, kwargs))):
            self._copy(Event(name, where(), used_bytes(subject)), waits=not kwargs.get("non_blocking"))
        return func(*args, **kwargs)

    def _copy(self, event: Event, *, waits: bool) -> None:
        self.counts.copies.append(event)
        if waits:
            self.counts.waits.append(event)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _names_a_device(args: tuple, kwargs: dict[str, Any]) -> bool:
    given = kwargs.get("device", args[1] if len(args) > 1 else None)
    return isinstance(given, (str, torch.device))


def _number_bytes(args: tuple, kwargs: dict[str, Any]) -> int:
    data = kwargs.get("data", args[-1])
    return 4 * len(tree_leaves(data))


def _moved(func, name: str, args: tuple, inputs: list[Tensor], results: list[Tensor]) -> int:
    """Return the bytes that an operator reads and writes at least."""
    if name in _SHAPED_LIKE:
        return _total(results)
    if name in _GATHER:
        return 2 * _total(results) + _total(inputs[1:])
    if name in _SCATTER:
        added = inputs[-1]
        return 3 * used_bytes(added) + _total(inputs[1:-1])
    mutated = _mutated(func, args)
    written = _distinct([*mutated, *results])
    read = _distinct(inputs)
    if name in _ONLY_WRITE:
        read = {key: size for key, size in read.items() if key not in _distinct(mutated)}
    return sum(read.values()) + sum(written.values())


def _mutated(func, args: tuple) -> list[Tensor]:
    return [
        tensor
        for argument, value in zip(func._schema.arguments, args, strict=False)
        if argument.alias_info is not None and argument.alias_info.is_write
        for tensor in _tensors(value)
    ]


def _total(tensors: list[Tensor]) -> int:
    return sum(used_bytes(tensor) for tensor in tensors)


def _distinct(tensors: list[Tensor]) -> dict[tuple, int]:
    """Return the sizes of tensors, those that show the same elements once."""
    return {
        (t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride()): used_bytes(t) for t in tensors
    }
