"""Low-rank updates of a frozen student backbone (LoRA, arXiv:2106.09685), by the package peft.

Only the student carries adapters. The teacher and all exports are plain ViTs that hold the merged weights
``W + alpha / rank * B A``; run states hold ``W``, ``A`` and ``B``, so that a resumed run is exact.
"""

import logging
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dinov2.errors import ConfigError
from dinov2.train.freezing import move_towards, train_unlearned_mask_token

logger = logging.getLogger("dinov2")

ADAPTER = "default"
# The linear layers of the blocks; patch_embed.proj has the name of one, but is a convolution outside them.
ADAPTED = r"blocks\..*\.(attn\.(qkv|proj)|mlp\.(fc1|fc2|w12|w3))"


def add_adapters(backbone: nn.Module, rank: int, alpha: float) -> None:
    """Freeze the backbone and give every linear layer of its blocks a low-rank update, in place.

    Call when the weights are loaded, and before parameter groups are made. The updates start at zero.

    Args:
        backbone: the student's.
        rank: width of the factors, >= 1.
        alpha: the updates count ``alpha / rank`` times.

    Raises:
        ConfigError: peft is not installed, or does not fit the other packages.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError(
            f"student.lora_rank is {rank}, which needs the package peft, which cannot be imported ({error}): "
            'run "uv pip install --upgrade peft", or set student.lora_rank to 0.'
        ) from error
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=ADAPTED, lora_dropout=0.0, bias="none")
    inject_adapter_in_model(config, backbone, adapter_name=ADAPTER)
    train_unlearned_mask_token(backbone)
    trained = sum(parameter.numel() for parameter in backbone.parameters() if parameter.requires_grad)
    logger.info("LoRA of rank %d: %s parameters of the student backbone learn", rank, f"{trained:,}")


def has_adapters(module: nn.Module) -> bool:
    """Tell whether :func:`add_adapters` was applied to ``module`` or something in it."""
    return any(_is_adapted(part) for part in module.modules())


def _is_adapted(module: nn.Module) -> bool:
    # Asked by attribute, because most runs have no adapters and must not need peft.
    return hasattr(module, "lora_A") and hasattr(module, "base_layer")


def merged_weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield (name in the plain model, merged weight) of every adapted layer, one at a time."""
    for name, part in module.named_modules():
        if _is_adapted(part):
            yield f"{name}.weight", part.base_layer.weight + part.get_delta_weight(ADAPTER)


@torch.no_grad()
def plain_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """Return the state of ``module`` as if it never had adapters: their updates merged, names as before."""
    state = module.state_dict()
    if not has_adapters(module):
        return state
    merged = dict(merged_weights(module))
    plain = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in state.items()
        if ".lora_A." not in name and ".lora_B." not in name
    }
    return {name: merged.get(name, tensor) for name, tensor in plain.items()}


@torch.no_grad()
def follow_adapted(teacher: nn.Module, student: nn.Module, share: float) -> None:
    """Move a plain ``teacher`` by ``share`` (0..1) towards what training moves of the adapted ``student``.

    The average is taken of the merged weights; that of the factors would be another matrix. Weights are
    merged one at a time, so that little memory is needed.
    """
    targets = dict(teacher.named_parameters())
    for name, weight in merged_weights(student):
        move_towards([(targets[name], weight)], share)
    moving = [(name, parameter) for name, parameter in student.named_parameters() if parameter.requires_grad]
    move_towards(((targets[name], parameter) for name, parameter in moving if name in targets), share)
