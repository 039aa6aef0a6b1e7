"""How modules are divided over the processes: PyTorch's ``fully_shard`` (FSDP2), on the CPU as on GPUs.

A module becomes units, which are gathered and freed one by one: each of its transformer blocks, and what is
left. Parameters keep their names; outside of forward and backward passes they are ``DTensor`` s, of which
each process holds a part. ``docs/sharding.md`` states what the strategies mean and how exact they are.
"""

from collections.abc import Callable, Collection
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from dinov2 import distributed
from dinov2.errors import ConfigError, nearest

# Strategy -> whether parameters are freed again between the forward and the backward pass.
RESHARD_AFTER_FORWARD = {"NO_SHARD": None, "SHARD_GRAD_OP": False, "FULL_SHARD": True, "HYBRID_SHARD": True}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def get_fsdp_wrapper(
    model_cfg: Any,
    modules_to_wrap: Collection[type[nn.Module]] = frozenset(),
    *,
    mesh: DeviceMesh | None = None,
    policy: MixedPrecisionPolicy | None = None,
    root_policy: MixedPrecisionPolicy | None = None,
) -> Callable[[nn.Module], nn.Module]:
    """Return a function that shards a module in place and returns it.

    Every process must hold equal values beforehand: ``fully_shard`` does not broadcast. Before parameters
    are looked at outside of a forward or backward pass, bring them back with :func:`reshard_fsdp_model`:
    ``SHARD_GRAD_OP`` leaves them gathered after a forward pass without a backward pass.

    Args:
        model_cfg: One entry of ``compute_precision``: ``sharding_strategy`` (a key of
            ``RESHARD_AFTER_FORWARD``) and ``mixed_precision`` with ``param_dtype`` and ``reduce_dtype``
            (``fp32``, ``fp16`` or ``bf16``). ``buffer_dtype`` has no effect: buffers keep the type they have.
        modules_to_wrap: Types of submodules that become sharding units of their own.
        mesh: The processes, from :func:`build_mesh`; by default all of them, for ``HYBRID_SHARD`` in groups
            of one machine. Modules that are trained together should share it.
        policy: Number formats of the units; by default those of ``model_cfg``, with inputs cast, too.
        root_policy: Number formats of what no inner unit holds; by default ``policy``.

    Raises:
        ConfigError: The strategy or a precision is unknown, or the processes cannot be grouped.
    """
    strategy = model_cfg.sharding_strategy
    reshard = _lookup(RESHARD_AFTER_FORWARD, strategy, "sharding_strategy")
    policy = policy or MixedPrecisionPolicy(
        param_dtype=_lookup(DTYPES, model_cfg.mixed_precision.param_dtype, "mixed_precision.param_dtype"),
        reduce_dtype=_lookup(DTYPES, model_cfg.mixed_precision.reduce_dtype, "mixed_precision.reduce_dtype"),
    )

    def wrap(module: nn.Module) -> nn.Module:
        if reshard is None or not distributed.is_enabled():
            return module
        whole_mesh = mesh or build_mesh(strategy, next(module.parameters()).device.type)
        inner = [child for child in module.modules() if isinstance(child, tuple(modules_to_wrap))]
        # Children first: a unit takes what the units inside it have left.
        for child in reversed([child for child in inner if child is not module]):
            _shard(child, whole_mesh, strategy, policy)
        return _shard(module, whole_mesh, strategy, root_policy or policy)

    return wrap


def _shard(module: nn.Module, mesh: DeviceMesh, strategy: str, policy: MixedPrecisionPolicy) -> nn.Module:
    size = mesh.size(mesh.ndim - 1)
    module.sharding_strategy = strategy
    return fully_shard(
        module,
        mesh=mesh,
        mp_policy=policy,
        reshard_after_forward=RESHARD_AFTER_FORWARD[strategy],
        shard_placement_fn=lambda parameter: _divided_axis(parameter.shape, size),
    )


def _divided_axis(shape: torch.Size, size: int) -> Shard | None:
    """Choose the axis along which a parameter is divided into ``size`` parts; None is the first.

    FSDP pads the first axis to a multiple of ``size``. Tokens and positions have 1 there: padded, they would
    be gathered ``size`` times as large as they are. Other axes must divide evenly.
    """
    if len(shape) == 0 or shape[0] >= size:
        return None
    fitting = (axis for axis in range(1, len(shape)) if shape[axis] % size == 0)
    axis = next(fitting, None)
    return None if axis is None else Shard(axis)


def hybrid_group_size(hybrid_shard_size: int | None) -> int:
    """Return how many processes divide a module among them with ``HYBRID_SHARD``.

    Args:
        hybrid_shard_size: The config's; None means the processes of one machine.

    Raises:
        ConfigError: The size does not divide the number of processes.
    """
    world_size = distributed.get_global_size()
    size = hybrid_shard_size or distributed.get_local_size()
    if world_size % size:
        fitting = ", ".join(str(n) for n in range(1, world_size + 1) if world_size % n == 0)
        source = "" if hybrid_shard_size else " (null: the processes of this machine)"
        raise ConfigError(
            f"compute_precision.hybrid_shard_size is {size}{source}, which does not divide the {world_size} "
            f"processes of this run into equal groups: set it to one of {fitting}"
        )
    return size


def effective_strategy(strategy: str, hybrid_shard_size: int | None = None) -> str:
    """Return what a strategy comes to: groups of all processes are FULL_SHARD, groups of one NO_SHARD.

    Raises:
        ConfigError: The strategy is unknown, or the group size does not divide the number of processes.
    """
    _lookup(RESHARD_AFTER_FORWARD, strategy, "sharding_strategy")
    if strategy != "HYBRID_SHARD":
        return strategy
    size = hybrid_group_size(hybrid_shard_size)
    if size == distributed.get_global_size():
        return "FULL_SHARD"
    return "NO_SHARD" if size == 1 else strategy


def build_mesh(
    strategy: str,
    device_type: str,
    hybrid_shard_size: int | None = None,
    *,
    timeout: timedelta | None = None,
) -> DeviceMesh:
    """Arrange the processes for a strategy; a collective call that makes communicators, so do it once.

    Args:
        strategy: A key of ``RESHARD_AFTER_FORWARD``.
        device_type: Of the parameters, e.g. ``cuda``.
        hybrid_shard_size: See :func:`hybrid_group_size`.
        timeout: How long a collective within the groups of ``HYBRID_SHARD`` may wait; None is PyTorch's
            default. All processes together use the group of the run, and so its time-out.

    Returns:
        ``[processes]``, for ``HYBRID_SHARD`` ``[groups, processes of a group]`` with neighbouring ranks in a
        group.

    Raises:
        ConfigError: The group size does not divide the number of processes.
    """
    if strategy != "HYBRID_SHARD":
        return DeviceMesh.from_group(dist.group.WORLD, device_type, mesh_dim_names=("shard",))
    ranks = torch.arange(distributed.get_global_size()).view(-1, hybrid_group_size(hybrid_shard_size))
    # init_device_mesh makes groups with PyTorch's own time-out, ten minutes with NCCL, and takes no other.
    shard, _ = dist.new_subgroups_by_enumeration(ranks.tolist(), timeout=timeout)
    replicate, _ = dist.new_subgroups_by_enumeration(ranks.T.tolist(), timeout=timeout)
    return DeviceMesh.from_group(
        [replicate, shard], device_type, mesh=ranks, mesh_dim_names=("replicate", "shard")
    )


def _lookup(table: dict[str, Any], name: str, key: str) -> Any:
    if name not in table:
        raise ConfigError(f'{key} is "{name}"{nearest(name, table)}, but must be one of {", ".join(table)}')
    return table[name]


def defer_gradient_reduction(module: nn.Module, deferred: bool) -> None:
    """Choose whether the next backward passes leave their gradients for a later one to reduce.

    For gradient accumulation: call with True before the first micro-batch, and with False before the
    backward pass of the last one. What that saves depends on the strategy of each unit in ``module``:

    - ``SHARD_GRAD_OP`` keeps gathered parameters and whole gradients on every process until the last
      micro-batch, and communicates once per step.
    - ``HYBRID_SHARD`` sums within a group after every micro-batch, between the groups once per step.
    - ``FULL_SHARD`` reduces after every micro-batch, as it must never hold whole gradients.

    Gradients add up alike with all of them, but for rounding. What is not sharded accumulates by itself.
    """
    for unit in get_fsdp_modules(module):
        if unit.sharding_strategy == "HYBRID_SHARD":
            unit.set_requires_all_reduce(not deferred, recurse=False)
        elif unit.sharding_strategy == "SHARD_GRAD_OP":
            unit.set_requires_gradient_sync(not deferred, recurse=False)
            unit.set_reshard_after_backward(not deferred, recurse=False)


def is_fsdp(x: nn.Module) -> bool:
    """Return whether ``x`` itself is a sharding unit."""
    return isinstance(x, FSDPModule)


def is_sharded_fsdp(x: nn.Module) -> bool:
    """Return whether ``x`` is a sharding unit whose parameters are really spread over several processes."""
    return is_fsdp(x) and distributed.get_global_size() > 1


def free_if_fsdp(x: nn.Module) -> None:
    """Give back the gathered parameters of ``x``, if it is a sharding unit."""
    if is_fsdp(x):
        x.reshard()


def get_fsdp_modules(x: nn.Module) -> list[nn.Module]:
    """Return the sharding units inside ``x``, ``x`` included."""
    return [module for module in x.modules() if is_fsdp(module)]


def reshard_fsdp_model(x: nn.Module) -> None:
    """Give back the gathered parameters of every sharding unit inside ``x``."""
    for module in get_fsdp_modules(x):
        free_if_fsdp(module)


def whole_tensor(tensor: Tensor) -> Tensor:
    """Return all of a tensor that may be sharded; every process must call, in the same order."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_part(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor that may be sharded, without a copy."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def laid_out_like(tensor: Tensor, target: Tensor) -> Tensor:
    """Return ``tensor`` divided over the processes as ``target`` is; they have the same shape.

    Every process must call, in the same order: where the two differ, the whole is gathered first.
    """
    if same_layout(tensor, target):
        return tensor
    whole = whole_tensor(tensor)
    if not isinstance(target, DTensor):
        return whole
    # Every process has the whole, so none needs to send it.
    return distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)


def same_layout(one: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors are divided over the processes alike, so that they can be combined."""
    if isinstance(one, DTensor) and isinstance(other, DTensor):
        return one.device_mesh == other.device_mesh and one.placements == other.placements
    return isinstance(one, DTensor) == isinstance(other, DTensor)


def whole_copy(module: nn.Module) -> nn.Module:
    """Return ``module`` with whole parameters on every process: a copy if it is sharded, else itself.

    Every process must call; afterwards the copy runs without the others, in the format of the parameters.
    Hooks are not copied. It takes the memory of all parameters until it is dropped.
    """
    if not get_fsdp_modules(module):
        return module
    reshard_fsdp_model(module)
    return _copy_whole(module)


def _copy_whole(module: nn.Module) -> nn.Module:
    # fully_shard has put a class of its own before the module's, which cannot be copied.
    kind = next(base for base in type(module).__bases__ if base is not FSDPModule)
    copy = object.__new__(kind if is_fsdp(module) else type(module))
    nn.Module.__init__(copy)
    own = vars(copy).keys()
    vars(copy).update({name: value for name, value in vars(module).items() if name not in own})
    copy.training = module.training
    copy._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
    for name, value in module._parameters.items():
        whole = value if value is None else nn.Parameter(whole_tensor(value.detach()), value.requires_grad)
        copy.register_parameter(name, whole)
    copy._buffers.update(module._buffers)
    for name, child in module._modules.items():
        copy.add_module(name, None if child is None else _copy_whole(child))
    return copy
