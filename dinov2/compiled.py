"""torch.compile where a run asks for it (``train.compile``)."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache

import torch

# Blocks that share a function differ in their shapes, in what is frozen, in whether gradients are taken.
MOST_VARIANTS = 64


@cache
def compiled(function: Callable) -> Callable:
    """Return ``function`` as compiled code, made anew for shapes that it has no code for."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_VARIANTS)
    return torch.compile(function)


def uncompiled() -> AbstractContextManager:
    """Return a context in which compiled functions run as written, so that hooks see their insides."""
    return torch.compiler.set_stance("force_eager")
