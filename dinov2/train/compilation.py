"""Compilation of blocks and losses (``train.compile``)."""

import logging
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from dinov2.compiled import compiled
from dinov2.errors import ConfigError, UserError
from dinov2.layers.block import Block

logger = logging.getLogger("dinov2")


class CompilationError(UserError, RuntimeError):
    """What a run was to compile can not be compiled."""


def is_wanted(setting: bool | None, kind: str) -> bool:
    """Return whether ``train.compile`` asks a device, ``cuda`` or ``cpu``, to compile: by default a GPU."""
    return kind == "cuda" if setting is None else setting


def wants_compiling(setting: bool | None, device: torch.device) -> bool:
    """Return whether a run on ``device`` compiles: what ``train.compile`` says, by default a GPU's does.

    The compiler is tried on a small function. A run that did not ask for it goes on without where that fails,
    and, where single functions fail later, without these, see :class:`WatchedCompiler`.

    Raises:
        ConfigError: the run asks for a compiler that does not work.
    """
    if not is_wanted(setting, device.type):
        return False
    obstacle = _missing(device) or _failure(device)
    if setting and obstacle:
        raise ConfigError(f"train.compile is true, but the compiler does not work: {obstacle}; leave it out")
    if obstacle:
        logger.warning(
            "this run is not compiled, which makes its steps about half as fast on a GPU: %s", obstacle
        )
        return False
    torch._dynamo.config.suppress_errors = setting is None
    return True


def _missing(device: torch.device) -> str:
    """Return what a GPU's compiler needs and does not have; empty for a CPU's, which knows itself."""
    if device.type != "cuda":
        return ""
    if find_spec("triton") is None:
        return "Triton is not installed"
    tools = ("cc", "gcc", "clang")
    if not os.environ.get("CC") and not any(map(shutil.which, tools)):
        return "there is no C compiler (install gcc, or set CC)"
    return ""


@cache
def _failure(device: torch.device) -> str:
    """Return why a small function and its gradient can not be compiled for ``device``; empty if they can."""
    with torch.inference_mode(False), torch.enable_grad(), torch._dynamo.config.patch(suppress_errors=False):
        x = torch.ones(8, 8, device=device, requires_grad=True)
        try:
            compiled(_small)(x).sum().backward()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # compilers and the tools they start raise anything
            return _reason(error)
    return ""


def _small(x: Tensor) -> Tensor:
    return nn.functional.gelu(x)


def compile_blocks(*backbones: nn.Module, required: bool) -> None:
    """Let the blocks of ``backbones`` run through torch.compile, from their first batch on.

    Blocks of equal shapes share their code. Heads are matrix products and stay as they are. Blocks that
    compute activations again selectively decide operator by operator what to keep, and stay, too.

    Args:
        backbones: the student's and the teacher's.
        required: whether it is an error if one of them has no blocks that can do so.

    Raises:
        ConfigError: it is, and has none.
    """
    count = 0
    for backbone in backbones:
        blocks = [module for module in backbone.modules() if isinstance(module, Block)]
        if required and not blocks:
            raise ConfigError(
                f"train.compile is true, but {type(backbone).__name__} has none of this package's "
                "transformer blocks: leave it out"
            )
        for block in blocks:
            block.set_compiled(block.recompute != "selective")
            count += block.compiled
    logger.info("compiled are the losses and %d blocks: the first steps take longer", count)


class WatchedCompiler:
    """Says what became of compiling, which happens when compiled code first meets new shapes."""

    def __init__(self) -> None:
        self._left_out = _left_out()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Turn what the compiler raises inside of the ``with`` into one sentence.

        Functions that it leaves as they are are logged: those that fail where the run did not ask to compile,
        and those that it gives up.

        Raises:
            CompilationError: the run did ask, or gradients can not be compiled.
        """
        try:
            yield
        except RuntimeError as error:
            if not _is_of_compiler(error):
                raise
            raise CompilationError(
                f"blocks or losses can not be compiled ({_reason(error)}): mend that, or go on without "
                "(train.compile=false)"
            ) from error
        before, self._left_out = self._left_out, _left_out()
        if self._left_out > before:
            logger.warning(
                "the compiler left %d functions of blocks or losses as they are, which is slower: "
                "TORCH_LOGS=dynamo makes it say why",
                self._left_out - before,
            )


def _is_of_compiler(error: RuntimeError) -> bool:
    # To import it takes more than a second, and without it there is none of its errors.
    compiler = sys.modules.get("torch._dynamo.exc")
    return compiler is not None and isinstance(error, compiler.TorchDynamoException)


def _left_out() -> int:
    compiler = sys.modules.get("torch._dynamo.utils")
    frames = compiler.counters["frames"] if compiler is not None else {}
    return frames.get("total", 0) - frames.get("ok", 0)


def _reason(error: Exception) -> str:
    """Return the line that says what went wrong, which the compiler's stages wrap one after the other."""
    cause = getattr(error, "inner_exception", error)
    # Of a process that compiles comes its traceback, of a compiler for C all that it had to say.
    traceback, output = getattr(cause, "details", ""), getattr(cause, "output", "")
    lines = [line.strip() for line in str(traceback or output or cause).splitlines() if line.strip()]
    if traceback:
        lines.reverse()
    elif output:
        lines.sort(key=lambda line: "error" not in line.lower())
    return lines[0] if lines else type(cause).__name__
