"""From the command line to a frozen backbone: what all evaluations have in common."""

import argparse
import copy
import logging
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn
from torch.backends import cudnn

from dinov2.configs import dinov2_default_config
from dinov2.errors import ConfigError
from dinov2.eval.other_models import OtherBackbone, is_other_model, open_other_model
from dinov2.eval.utils import computed_dtype, device_of
from dinov2.models import build_model
from dinov2.models.auto import AUTO, settle_architecture
from dinov2.models.companions import same_constants
from dinov2.models.pretrained import BackboneWeights, load_backbone, open_weights
from dinov2.utils.config import setup
from dinov2.utils.device import resolve_device

logger = logging.getLogger("dinov2")

AUTOCAST_DTYPES = {"fp16": torch.half, "bf16": torch.bfloat16}


def get_args_parser(
    description: str | None = None,
    parents: list[argparse.ArgumentParser] | None = None,
    add_help: bool = True,
) -> argparse.ArgumentParser:
    """Return a parser of the options that say which model to evaluate and where to write."""
    parser = argparse.ArgumentParser(description=description, parents=parents or [], add_help=add_help)
    parser.add_argument("--config-file", type=str, help="Config of the model (default: the packaged one)")
    parser.add_argument(
        "--pretrained-weights",
        type=str,
        help="Path or URL of the weights to evaluate; or timm:NAME or transformers:NAME_OR_FOLDER, a model "
        "of that library",
    )
    parser.add_argument("--output-dir", type=str, default="", help="Folder for results and logs")
    parser.add_argument(
        "--opts", nargs="+", default=[], help="Config overrides as key=value", metavar="KEY=VALUE"
    )
    parser.add_argument(
        "--lenient-config", action="store_true", help="Warn about unknown config keys instead of stopping"
    )
    return parser


def get_autocast_dtype(config: Any) -> torch.dtype:
    """Return the number format the config gives the teacher backbone, float32 unless it is fp16 or bf16."""
    name = config.compute_precision.teacher.backbone.mixed_precision.param_dtype
    return AUTOCAST_DTYPES.get(name, torch.float32)


def build_model_for_eval(config: Any, pretrained_weights: str | None) -> nn.Module:
    """Build the backbone of a config, load weights and freeze it, on the device ``config.train.device``.

    Args:
        pretrained_weights: Path or URL, or a model of :mod:`dinov2.eval.other_models`, which the config says
            nothing of. None leaves the weights random, with a warning: a baseline.

    Raises:
        WeightsError: The weights cannot be read or do not fit.
    """
    if is_other_model(pretrained_weights):
        return _ready(open_other_model(pretrained_weights), config)
    weights = open_weights(pretrained_weights, "teacher") if pretrained_weights else None
    if config.student.arch == AUTO and weights is None:
        raise ConfigError(
            "student.arch is auto, but there are no weights to read the architecture from: give "
            "--pretrained-weights (the config says where training starts, not what is evaluated), or name "
            "the architecture"
        )
    if weights is not None:
        settle_architecture(config.student, weights, dinov2_default_config.student)
        _compare_normalisation(config, weights)
    model, _ = build_model(config.student, only_teacher=True, img_size=_laid_out_for(config, weights))
    if weights is not None:
        load_backbone(
            model,
            weights,
            pos_embed=config.student.pos_embed_resampling,
            patch_embed=config.student.patch_embed_resampling,
        )
    else:
        logger.warning("no --pretrained-weights given: the network is random, its scores are a baseline")
    return _ready(model, config)


def _laid_out_for(config: Any, weights: BackboneWeights | None) -> int:
    """Return the pixels of the images for whose patches the network has positions.

    Those of the weights: to have them resampled to the config's crops here, and then to the images that are
    evaluated, would lose some of what they are.
    """
    kept = weights is not None and weights.grid and config.student.pos_embed_resampling == "interpolate"
    return weights.grid * config.student.patch_size if kept else config.crops.global_crops_size


def _ready(model: nn.Module, config: Any) -> nn.Module:
    return model.eval().requires_grad_(False).to(resolve_device(config.train.device))


def _compare_normalisation(config: Any, weights: BackboneWeights) -> None:
    """Warn if the images will be normalised otherwise than those that the weights were trained with."""
    given = tuple(config.crops.mean), tuple(config.crops.std)
    if weights.normalisation and not same_constants(weights.normalisation, given):
        mean, std = weights.normalisation
        logger.warning(
            "%s %s on images normalised with mean %s and std %s, but crops.mean is %s and "
            "crops.std %s: set them to the former",
            weights.source,
            "was trained"
            if weights.normalisation_origin == "stated"
            else f"looks like {weights.looks_like}, trained",
            *(list(mean), list(std), *map(list, given)),
        )


def setup_and_build_model(args: argparse.Namespace) -> tuple[nn.Module, torch.dtype]:
    """Set up the process (config, log, process group, seeds) and return the model and its number format.

    The format is the one that its device computes in, as results and stores name it.
    ``args.normalisation`` becomes ``mean`` and ``std`` of the config, for the transform of the images,
    ``args.path_map`` its ``train.path_map``, for the datasets, and ``args.model_config`` its ``student``.
    For a model of another library they are its own constants and its name.
    ``args.config`` is the config itself, before weights settled what it leaves open, for a second model.
    """
    cudnn.benchmark = True
    config = setup(args, keep_existing_config=True)
    args.path_map = dict(config.train.path_map)
    args.normalisation = {"mean": list(config.crops.mean), "std": list(config.crops.std)}
    args.config = copy.deepcopy(config)
    model = build_model_for_eval(config, args.pretrained_weights)
    args.model_config = OmegaConf.to_container(config.student)
    if isinstance(model, OtherBackbone):
        args.normalisation = model.normalisation or args.normalisation
        args.model_config = {"arch": model.name}
    return model, computed_dtype(device_of(model), get_autocast_dtype(config))
