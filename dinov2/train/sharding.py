"""From ``compute_precision`` to sharded networks: strategies, groups of processes and number formats."""

import logging
import warnings
from datetime import timedelta

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy

from dinov2 import distributed
from dinov2.fsdp import get_fsdp_wrapper
from dinov2.fsdp.sharding import build_mesh, effective_strategy
from dinov2.layers import NestedTensorBlock
from dinov2.layers.dino_head import WeightNormLinear
from dinov2.models.checkpoint_names import HEADS, NETWORKS
from dinov2.models.vision_transformer import BlockChunk
from dinov2.train.precision import Precision

logger = logging.getLogger("dinov2")


def require_equal_groups(compute_precision: DictConfig) -> None:
    """Check, before anything is built, that the processes form the groups that HYBRID_SHARD asks for.

    Raises:
        ConfigError: ``hybrid_shard_size`` does not divide the number of processes.
    """
    for network in NETWORKS:
        for part in ("backbone", *HEADS):
            strategy = compute_precision[network][part].sharding_strategy
            effective_strategy(strategy, compute_precision.hybrid_shard_size)


def shard_networks(
    student: nn.ModuleDict,
    teacher: nn.ModuleDict,
    precision: Precision,
    compute_precision: DictConfig,
    timeout: timedelta | None = None,
) -> None:
    """Shard every part of both networks in place by its own strategy; all processes must call.

    Blocks and the layers of heads are gathered in the format they compute in. Activations keep their
    formats, which autocast chooses.

    Args:
        student, teacher: submodules by name, on their device and equal on all processes.
        precision: number formats on that device.
        compute_precision: the config section.
        timeout: how long a collective within a group of HYBRID_SHARD may wait; None is PyTorch's default.

    Raises:
        ConfigError: the processes cannot be grouped for HYBRID_SHARD.
    """
    # The backbone returns views of its tokens, and nothing here writes to them.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    meshes: dict[bool, DeviceMesh] = {}
    size = compute_precision.hybrid_shard_size
    for network, modules in (("student", student), ("teacher", teacher)):
        for part, module in modules.items():
            strategy = effective_strategy(compute_precision[network][part].sharding_strategy, size)
            logger.info("%s %s: %s", network, part, _describe(strategy, network, part, precision))
            if strategy == "NO_SHARD":
                continue
            hybrid = strategy == "HYBRID_SHARD"
            if hybrid not in meshes:
                meshes[hybrid] = build_mesh(strategy, precision.device.type, size, timeout=timeout)
            units, unit_policy, root_policy = _units(module, network, part, precision)
            wrap = get_fsdp_wrapper(
                OmegaConf.merge(compute_precision[network][part], {"sharding_strategy": strategy}),
                units,
                mesh=meshes[hybrid],
                policy=unit_policy,
                root_policy=root_policy,
            )
            wrap(module)


def _units(
    module: nn.Module, network: str, part: str, precision: Precision
) -> tuple[set[type[nn.Module]], MixedPrecisionPolicy, MixedPrecisionPolicy]:
    """Return which submodules become units of their own, in which formats, and the formats of the rest.

    Two things are gathered in float32 whatever the network computes in. Tokens, positions, patch embedding
    and final norm are small, and their rounding would reach every block. The directions of the prototypes
    are normalised after they are gathered: rounded before, the losses differ by ten times as much from those
    of whole networks.
    """
    reduce_dtype = precision.reduce_dtypes[network, part]
    narrow = _policy(precision.dtypes[network, part], reduce_dtype)
    if part != "backbone":
        return {WeightNormLinear}, _policy(torch.float32, reduce_dtype), narrow
    chunked = any(isinstance(child, BlockChunk) for child in module.modules())
    blocks = {BlockChunk} if chunked else {NestedTensorBlock}
    return blocks, narrow, _policy(torch.float32, torch.float32)


def _policy(param_dtype: torch.dtype, reduce_dtype: torch.dtype) -> MixedPrecisionPolicy:
    return MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)


def _describe(strategy: str, network: str, part: str, precision: Precision) -> str:
    world_size = distributed.get_global_size()
    if strategy == "NO_SHARD":
        return f"NO_SHARD, whole on each of {world_size} processes"
    text = f"{strategy} over {world_size} processes, gathered in {_name(precision.dtypes[network, part])}"
    if network == "teacher":
        return text
    return f"{text}, gradients averaged in {_name(precision.reduce_dtypes[network, part])}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
