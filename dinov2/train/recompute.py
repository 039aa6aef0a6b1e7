"""Activation checkpointing of the student's backbone (``train.activation_checkpointing``)."""

import logging

from torch import nn

from dinov2.errors import ConfigError
from dinov2.layers.block import Block

logger = logging.getLogger("dinov2")


def recompute_activations(backbone: nn.Module, mode: str) -> None:
    """Let the backward pass of every block of ``backbone`` compute values again, see dinov2.layers.recompute.

    Args:
        backbone: the student's; the teacher has no backward pass.
        mode: ``none``, ``selective`` or ``full``.

    Raises:
        ConfigError: the backbone has no blocks that can do so.
    """
    if mode == "none":
        return
    blocks = [module for module in backbone.modules() if isinstance(module, Block)]
    if not blocks:
        raise ConfigError(
            f"train.activation_checkpointing is {mode!r}, but {type(backbone).__name__} has none of this "
            "package's transformer blocks: set it to none"
        )
    for block in blocks:
        block.recompute = mode
    logger.info("activation checkpointing: %s, in %d blocks of the student", mode, len(blocks))
