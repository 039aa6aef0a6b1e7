"""The networks on PyTorch's meta device, where tensors have shapes but no values, and their parameters."""

from dataclasses import dataclass

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from dinov2.train.freezing import freeze_first_blocks
from dinov2.train.lora import add_adapters
from dinov2.train.ssl_meta_arch import SSLMetaArch


@dataclass(frozen=True)
class Part:
    """Numbers of parameters of a backbone or head, in student and teacher."""

    name: str  # backbone, dino_head or ibot_head
    student: int
    teacher: int
    trainable: int
    cast: int  # of the student's matrices, which a computation in half precision copies
    largest_unit: int  # of what sharding gathers at once: a block, or the whole head
    units: int  # of sharding


@dataclass(frozen=True)
class Networks:
    """The networks on the meta device and their parameters by part."""

    backbone: nn.Module  # the student's
    parts: tuple[Part, ...]

    def total(self, count: str) -> int:
        """Sum one of the counts of :class:`Part` over all parts."""
        return sum(getattr(part, count) for part in self.parts)


def build_networks(cfg: DictConfig, *, mask_token_learns: bool = True) -> Networks:
    """Build what a run trains, without memory for it and without reading weights.

    Args:
        cfg: resolved config, ``student.arch`` settled.
        mask_token_learns: with frozen blocks, whether the mask token is trained: it is where the weights to
            start from lack it (:func:`dinov2.train.freezing.train_unlearned_mask_token`).
    """
    blank = OmegaConf.merge(cfg, {})
    blank.student.pretrained_weights = blank.train.init_weights_from_chkpt = ""
    blank.head.head_path = None
    with torch.device("meta"):
        model = SSLMetaArch(blank)
    backbone = model.student["backbone"]
    # Freezing looks at the values of the mask token, the only ones that decide what is trained.
    backbone.mask_token = nn.Parameter((torch.zeros if mask_token_learns else torch.ones)(1, model.embed_dim))
    freeze_first_blocks(backbone, cfg.train.freeze_blocks)
    if cfg.student.lora_rank:
        with torch.device("meta"):
            add_adapters(backbone, cfg.student.lora_rank, cfg.student.lora_alpha)
    parts = [_part(name, model.student[name], model.teacher[name]) for name in model.student]
    return Networks(backbone, tuple(parts))


def _part(name: str, student: nn.Module, teacher: nn.Module) -> Part:
    blocks = [block for block in student.modules() if hasattr(block, "sample_drop_ratio")]
    in_blocks = [_count(block) for block in blocks]
    matrices = [p for p in student.parameters() if p.ndim >= 2 and min(p.shape[:2]) > 1]
    return Part(
        name=name,
        student=_count(student),
        teacher=_count(teacher),
        trainable=sum(p.numel() for p in student.parameters() if p.requires_grad),
        cast=sum(p.numel() for p in matrices),
        largest_unit=max([*in_blocks, _count(student) - sum(in_blocks)]),
        units=len(blocks) + 1,
    )


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
