"""torch.compile where a run asks for it (``train.compile``)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import Tensor

# Blocks that share a function differ in their shapes, in what is frozen, in whether gradients are taken.
MOST_VARIANTS = 64

_left_to_autograd: list[Callable] = []
_as_written: ContextVar[bool] = ContextVar("as_written", default=False)


def left_to_autograd(function: Callable) -> Callable:
    """Mark a function around a ``torch.autograd.Function``; also usable as a decorator.

    Compiled code takes its operators in as autograd records them. PyTorch 2.11's dynamo, which otherwise
    takes such classes apart itself, lost gradients on a GPU.
    """
    _left_to_autograd.append(function)
    return function


@torch.library.custom_op("dinov2::kept", mutates_args=())
def kept(x: Tensor) -> Tensor:
    """Return ``x``; where a backward pass needs it, compiled code keeps it, and does not compute it again.

    Whether it keeps what is cheap to compute, or what that is computed from, otherwise depends on how it
    guesses at their sizes.
    """
    return x.clone()


@kept.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def prepare_compiler() -> None:
    """Tell the compiler of what this package marks for it; not at import, as to load it takes a second."""
    from torch._inductor.lowering import register_lowering

    for marked in _left_to_autograd:
        torch.compiler.allow_in_graph(marked)
    register_lowering(torch.ops.dinov2.kept.default, type_promotion_kind=None)(lambda x: x)  # no copy


@cache
def compiled(function: Callable, **options: Any) -> Callable:
    """Return ``function`` as compiled code, made anew for shapes that it has no code for.

    Args:
        function: to compile.
        options: of ``torch.compile``.
    """
    prepare_compiler()
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_VARIANTS)
    return torch.compile(function, **options)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Let compiled and recorded functions run as written inside the ``with``: hooks see their insides."""
    token = _as_written.set(True)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        _as_written.reset(token)


def runs_as_written() -> bool:
    """Return whether this is inside of :func:`uncompiled`."""
    return _as_written.get()
