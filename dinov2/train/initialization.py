"""Where the first weights come from: a pretrained backbone and, optionally, pretrained heads."""

import logging
from pathlib import Path

from omegaconf import DictConfig
from torch import nn

from dinov2.errors import ConfigError, WeightsError
from dinov2.models.pretrained import load_backbone, load_head
from dinov2.train.initial_weights import InitialWeights, Part, fingerprint

logger = logging.getLogger("dinov2")

HEADS = ("dino_head", "ibot_head")


def pretrained_source(cfg: DictConfig) -> str:
    """Return the backbone file named by either spelling, or an empty string for random weights."""
    sources = {
        "student.pretrained_weights": cfg.student.pretrained_weights,
        "train.init_weights_from_chkpt": cfg.train.init_weights_from_chkpt,
    }
    named = {key: value for key, value in sources.items() if value}
    if len(set(named.values())) > 1:
        seen = " and ".join(f"{key}={value}" for key, value in named.items())
        raise ConfigError(f"{seen} name different weights to start from; keep one of the two keys.")
    return next(iter(named.values()), "")


def load_initial_weights(student: nn.ModuleDict, teacher: nn.ModuleDict, cfg: DictConfig) -> InitialWeights:
    """Load what the config names into the networks.

    The backbone goes into the student, from which the teacher copies it. Heads come in pairs from
    ``head.head_path``.

    Returns:
        What was loaded; teacher submodules among it must not be overwritten by the student's.

    Raises:
        WeightsError: if a file is missing or does not fit.
    """
    parts = {}
    source = pretrained_source(cfg)
    if source:
        backbone = student["backbone"]
        report = load_backbone(backbone, source)
        state = backbone.state_dict()
        loaded = sum(state[name].numel() for name in report.loaded)
        parts["student.backbone"] = Part(
            source=report.source,
            share=loaded / sum(tensor.numel() for tensor in state.values()),
            missing=report.missing,
            fingerprint=fingerprint(backbone),
            resampled=report.resampled,
        )
    else:
        logger.info("student backbone: random weights (student.pretrained_weights is empty)")
    if cfg.head.head_path:
        parts |= _load_heads(student, teacher, Path(cfg.head.head_path))
    return InitialWeights(parts)


def _load_heads(student: nn.ModuleDict, teacher: nn.ModuleDict, folder: Path) -> dict[str, Part]:
    if not folder.is_dir():
        raise WeightsError(
            f"head.head_path is {str(folder)!r}, which is not a folder; name a folder such as "
            "eval/training_9999 that holds student_dino_head_checkpoint.pth and its teacher counterpart."
        )
    wanted = [name for name in HEADS if name in student]
    files = {
        (network, head): folder / f"{network}_{head}_checkpoint.pth"
        for head in wanted
        for network in ("student", "teacher")
    }
    missing = [path.name for path in files.values() if not path.is_file()]
    if missing:
        raise WeightsError(
            f"head.head_path {str(folder)!r} lacks {', '.join(missing)}; student and teacher heads are "
            "needed together for every head the config trains (see ibot.separate_head)."
        )
    parts = {}
    for (network, head), path in files.items():
        module = (student if network == "student" else teacher)[head]
        load_head(module, str(path), f"{network}_{head}")
        parts[f"{network}.{head}"] = Part(
            source=str(path), share=1.0, missing=[], fingerprint=fingerprint(module)
        )
    return parts
