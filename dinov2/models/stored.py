"""Tensors of a weight file that are read when they are needed, so that no file fills the memory."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import prod

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
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor] = field(repr=False)
    names: tuple[str, ...]
    how: tuple[str, ...] = ()

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

    def changed(self, change: Callable[[Tensor], Tensor], how: str) -> "StoredTensor":
        """Return the tensor that ``change`` makes of this one, made when it is read.

        Args:
            change: Is also called with a tensor without data (on the meta device), to learn the shape.
            how: The conversion, in words.
        """
        outcome = change(torch.empty(self.shape, dtype=self.dtype, device="meta"))
        return replace(
            self,
            shape=tuple(outcome.shape),
            dtype=outcome.dtype,
            read=lambda: change(self.read()),
            how=_appended(self.how, how),
        )


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
