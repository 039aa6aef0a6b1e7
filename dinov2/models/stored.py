"""Tensors of a weight file that are read when they are needed, so that no file fills the memory."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from dinov2.errors import WeightsError


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor that is known by shape and type, and read on demand.

    Attributes:
        shape: Its shape once read.
        dtype: Its type once read.
        read: Returns the tensor, on the CPU; every call reads again.
        names: The tensors of the file that it is made of.
        how: The conversions applied since, in order.
        file: The file it is read from, if it is known.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor] = field(repr=False)
    names: tuple[str, ...]
    how: tuple[str, ...] = ()
    file: str = ""

    @classmethod
    def of(cls, tensor: Tensor, name: str) -> "StoredTensor":
        """Return a tensor that is in memory, or mapped into it, as a stored one."""
        tensor = tensor.detach()
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor, (name,))

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return len(self.shape)

    @property
    def is_floating_point(self) -> bool:
        """Whether the values are floating-point numbers."""
        return self.dtype.is_floating_point

    @property
    def numel(self) -> int:
        """The number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The size in memory once read, in bytes."""
        return self.numel * self.dtype.itemsize

    def converted(self, how: str) -> "StoredTensor":
        """Return the same tensor with one more conversion on record, such as a new name."""
        return replace(self, how=_appended(self.how, how))


def concatenated(parts: Sequence[StoredTensor], how: str) -> StoredTensor:
    """Return the parts as one tensor, joined along their first dimension when it is read.

    Raises:
        WeightsError: The parts do not fit together.
    """
    first = parts[0]
    if any(
        part.ndim == 0 or part.shape[1:] != first.shape[1:] or part.dtype != first.dtype for part in parts
    ):
        found = ", ".join(f"{'+'.join(part.names)} {part.shape} {part.dtype}" for part in parts)
        raise WeightsError(
            f"Tensors that belong together differ in width or type ({found}): the file is damaged or was put "
            "together from several; use the original."
        )
    shape = (sum(part.shape[0] for part in parts), *first.shape[1:])

    def read() -> Tensor:
        whole, start = torch.empty(shape, dtype=first.dtype), 0
        for part in parts:  # one part after the other, so that only one of them is in memory twice
            whole[start : start + part.shape[0]] = part.read()
            start += part.shape[0]
        return whole

    names = tuple(name for part in parts for name in part.names)
    earlier = tuple(dict.fromkeys(step for part in parts for step in part.how))
    return StoredTensor(shape, first.dtype, read, names, _appended(earlier, how))


def _appended(how: tuple[str, ...], step: str) -> tuple[str, ...]:
    return how if step in how else (*how, step)


def derived(
    parts: Sequence[StoredTensor], shape: Sequence[int], compute: Callable[..., Tensor], how: str
) -> StoredTensor:
    """Return what ``compute`` makes of the parts, computed when it is read.

    Args:
        parts: What is computed from; the outcome has the type of the first.
        shape: Shape of the outcome.
        compute: Called with the parts as tensors.
        how: The conversion, in words.
    """
    names = tuple(dict.fromkeys(name for part in parts for name in part.names))
    earlier = tuple(dict.fromkeys(step for part in parts for step in part.how))
    return StoredTensor(
        tuple(shape),
        parts[0].dtype,
        lambda: compute(*(part.read() for part in parts)),
        names,
        _appended(earlier, how),
    )


def stored_content(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a dictionary as a file would hold it, with a :class:`StoredTensor` for every tensor."""
    stored: dict[str, Any] = {}
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, Tensor):
            stored[key] = StoredTensor.of(value, name)
        else:
            stored[key] = stored_content(value, f"{name}.") if isinstance(value, Mapping) else value
    return stored
