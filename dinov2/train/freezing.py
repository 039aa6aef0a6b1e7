"""Starting gently: which parts of the student backbone learn, and from when on.

Fresh heads send noise into the backbone until they have learned something. ``train.freeze_blocks`` keeps the
first blocks for the whole run, ``train.freeze_backbone_iterations`` all of them until the heads are ready.
What is frozen has ``requires_grad`` False: its backward pass is skipped and AdamW keeps no state for it.
"""

import logging
from collections.abc import Iterable
from dataclasses import replace

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from dinov2.errors import ConfigError
from dinov2.fsdp.sharding import laid_out_like, same_layout
from dinov2.train.schedules import ScheduleValues
from dinov2.utils.param_groups import count_blocks, layer_index

logger = logging.getLogger("dinov2")


def freeze_first_blocks(backbone: nn.Module, num_frozen: int) -> None:
    """Freeze token preparation and the first blocks for good; call before parameter groups are made.

    A mask token that is all zeros stays trainable, see :func:`train_unlearned_mask_token`.

    Args:
        backbone: a :class:`dinov2.models.vision_transformer.DinoVisionTransformer`.
        num_frozen: blocks to freeze; 0 freezes nothing, not even the token preparation.

    Raises:
        ConfigError: the backbone has fewer blocks.
    """
    if not num_frozen:
        return
    num_blocks, chunked_blocks = count_blocks(backbone)
    if num_frozen > num_blocks:
        raise ConfigError(
            f"train.freeze_blocks is {num_frozen}, but the backbone has only {num_blocks} blocks: "
            f"set it to at most {num_blocks}"
        )
    for name, parameter in backbone.named_parameters():
        if layer_index(name, num_blocks, chunked_blocks) <= num_frozen:
            parameter.requires_grad_(False)
    train_unlearned_mask_token(backbone)
    logger.info("frozen for the whole run: token preparation and %d of %d blocks", num_frozen, num_blocks)


def train_unlearned_mask_token(backbone: nn.Module) -> None:
    """Let the mask token of a partly frozen backbone learn if it never has, that is if it is all zeros.

    Many releases leave it out. Only masked crops of the student see it, so learning cannot spoil a feature;
    zeros, in contrast, are an input that frozen blocks have never met. A learned one stays frozen like the
    other tokens, which spares the backward pass through the frozen blocks.
    """
    if not backbone.mask_token.any():
        backbone.mask_token.requires_grad_(True)
        logger.info("the mask token is all zeros, as in weights that lack it: it is trained")


class BackboneStart:
    """Keeps the student backbone still for the first iterations; then its learning rate rises from 0.

    Everything is a function of the iteration, so that a resumed run needs no state. With
    ``train.freeze_backbone_iterations`` N > 0 and a learning-rate warm-up of W iterations, the backbone's
    learning rate is multiplied by ``min((i - N) / W, 1)`` from iteration N on, beside the schedule that the
    heads follow, too. With N = 0 the factor is 1 throughout.

    Args:
        cfg: resolved config.
        backbone: the student's, after its parameter groups were made; what is frozen by then stays so.
    """

    def __init__(self, cfg: DictConfig, backbone: nn.Module) -> None:
        self.num_frozen = cfg.train.freeze_backbone_iterations
        self.num_rising = cfg.optim.warmup_epochs * cfg.train.OFFICIAL_EPOCH_LENGTH
        self.parameters = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
        if self.num_frozen:
            logger.info(
                "the student backbone is frozen before iteration %d; its learning rate then rises over %d",
                self.num_frozen,
                self.num_rising,
            )

    def enter(self, iteration: int, values: ScheduleValues) -> ScheduleValues:
        """Freeze or release the backbone for ``iteration`` and add its factor to the iteration's values."""
        for parameter in self.parameters:
            parameter.requires_grad_(iteration >= self.num_frozen)
        return replace(values, backbone_lr_factor=self.lr_factor(iteration))

    def lr_factor(self, iteration: int) -> float:
        """Return the factor on the backbone's learning rate at a zero-based iteration, 0..1."""
        if iteration < self.num_frozen:
            return 0.0
        risen = iteration - self.num_frozen
        return risen / self.num_rising if self.num_frozen and risen < self.num_rising else 1.0


def moving_pairs(teacher: nn.Module, student: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Return (teacher's, student's) of all parameters that are not frozen in the student.

    Where the student stands still the teacher does, too: it holds the same values, or those that it was
    loaded with.
    """
    pairs = zip(teacher.parameters(), student.parameters(), strict=True)
    return [(mine, other) for mine, other in pairs if other.requires_grad]


@torch.no_grad()
def move_towards(pairs: Iterable[tuple[Tensor, Tensor]], share: float) -> None:
    """Move the first tensor of each pair by ``share`` (0..1) towards the second, in place.

    Either may be sharded, and they may be so in different ways; then every process must call. Those that are
    divided alike are moved together and without communication, others one at a time.
    """
    pairs = list(pairs)
    alike = [pair for pair in pairs if same_layout(*pair)]
    if alike:
        torch._foreach_lerp_(*map(list, zip(*alike, strict=True)), share)
    for mine, other in pairs:
        if not same_layout(mine, other):
            torch._foreach_lerp_([mine], [laid_out_like(other, mine)], share)
