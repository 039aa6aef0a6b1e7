"""Compilation of blocks and losses (``train.compile``)."""

import logging
import os
import shutil
from importlib.util import find_spec

import torch
from torch import nn

from dinov2.errors import ConfigError
from dinov2.layers.block import Block

logger = logging.getLogger("dinov2")


def wants_compiling(setting: bool | None, device: torch.device) -> bool:
    """Return whether a run on ``device`` compiles: what ``train.compile`` says, by default a GPU's does.

    A run that did not ask for it goes on without where compiling fails, which PyTorch then logs.
    """
    if setting is not None:
        return setting
    if device.type != "cuda":
        return False
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not compiler or find_spec("triton") is None:
        logger.warning(
            "this run is not compiled, which makes its steps about half as fast on a GPU: %s",
            "Triton is not installed" if compiler else "there is no C compiler (install gcc, or set CC)",
        )
        return False
    torch._dynamo.config.suppress_errors = True
    return True


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
            block.compiled = block.recompute != "selective"
            count += block.compiled
    logger.info("compiled are the losses and %d blocks: the first steps take longer", count)
