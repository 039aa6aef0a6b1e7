"""The process group: starting it, asking about it, and collectives that do nothing without it.

Everything here works in one process with no group at all. The launcher's variables are read in
:mod:`dinov2.distributed.environment`; PyTorch's own group is the only state.
"""

import atexit
import logging
import os
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from dinov2.distributed.environment import ProcessEnvironment, resolve
from dinov2.errors import ConfigError

logger = logging.getLogger("dinov2")

T = TypeVar("T")

__all__ = [
    "all_gather_objects",
    "all_reduce_max_",
    "all_reduce_sum_",
    "barrier",
    "broadcast_object",
    "collective_device",
    "disable",
    "enable",
    "get_global_rank",
    "get_global_size",
    "get_local_rank",
    "get_local_size",
    "is_enabled",
    "is_main_process",
    "local_cuda_device",
]


def is_enabled() -> bool:
    """Return whether a process group exists."""
    return dist.is_available() and dist.is_initialized()


def get_global_size() -> int:
    """Return the number of processes of the run, 1 without a group."""
    if not is_enabled():
        return 1
    return dist.get_world_size()


def get_global_rank() -> int:
    """Return the index of this process among all processes of the run, 0 without a group."""
    if not is_enabled():
        return 0
    return dist.get_rank()


def get_local_rank() -> int:
    """Return the index of this process on its machine, 0 without a group."""
    return int(os.environ.get("LOCAL_RANK", get_global_rank())) if is_enabled() else 0


def get_local_size() -> int:
    """Return the number of processes on this machine, 1 without a group."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", get_global_size())) if is_enabled() else 1


def is_main_process() -> bool:
    """Return whether this is the one process that prints and writes shared files."""
    return get_global_rank() == 0


def enable(
    *,
    set_cuda_current_device: bool = True,
    overwrite: bool = False,
    allow_nccl_timeout: bool = False,
    device: str | torch.device | None = None,
    backend: str | None = None,
    timeout: timedelta | None = None,
) -> None:
    """Join the process group that the launcher describes; with a single process there is nothing to join.

    Calling it again is harmless. The group is closed when the process ends. Unlike upstream DINOv2 no
    group is made for a single process without a launcher, and the builtin ``print`` is left alone.

    Args:
        set_cuda_current_device: Make ``cuda:<local rank>`` the current device.
        overwrite: Replace launcher variables that are set to something else (Slurm only).
        allow_nccl_timeout: Let NCCL abort the process when a collective exceeds ``timeout``.
        device: Where the tensors of the run live; None means CUDA when there is any.
        backend: ``nccl`` or ``gloo``; None means the one that suits ``device``.
        timeout: How long a collective may wait for the other processes; None is PyTorch's default.

    Raises:
        ConfigError: The launcher's variables are incomplete or contradict each other.
    """
    if is_enabled():
        logger.debug("the process group exists already, nothing to enable")
        return
    environment = resolve(os.environ)
    on_cuda = torch.cuda.is_available() if device is None else torch.device(device).type == "cuda"
    if on_cuda and set_cuda_current_device:
        torch.cuda.set_device(local_cuda_device())
    if environment.launcher == "single":
        return
    _export(environment.variables(), overwrite)
    if allow_nccl_timeout:
        _export({"TORCH_NCCL_ASYNC_ERROR_HANDLING": "1"}, overwrite)
    dist.init_process_group(
        backend or ("nccl" if on_cuda else "gloo"),
        rank=environment.rank,
        world_size=environment.world_size,
        timeout=timeout,
        store=_store_of_this_attempt(environment, timeout),
        # Tells NCCL which device belongs to this rank before the first collective has to guess it.
        device_id=local_cuda_device() if on_cuda and backend in (None, "nccl") else None,
    )
    atexit.register(disable)
    barrier()


def _store_of_this_attempt(environment: ProcessEnvironment, timeout: timedelta | None) -> dist.Store | None:
    """Return a store without what processes left that torchrun has replaced; None for the usual one.

    torchrun keeps one store over its restarts (PyTorch 2.13), with the addresses of the dead: who reads them
    before they are overwritten waits for ever. Only on one machine do all processes know the attempt: each
    machine's torchrun counts its own.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    on_one_machine = os.environ.get("GROUP_WORLD_SIZE") == "1"
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or attempt == "0" or not on_one_machine:
        return None
    patience = {} if timeout is None else {"timeout": timeout}
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), environment.world_size, False, **patience
    )
    return dist.PrefixStore(f"attempt_{attempt}", store)


def disable() -> None:
    """Leave the process group, if there is one."""
    if is_enabled():
        dist.destroy_process_group()


def local_cuda_device() -> torch.device:
    """Return the CUDA device that belongs to this process, known also before :func:`enable`.

    Raises:
        ConfigError: The machine has fewer devices than processes.
    """
    local_rank = get_local_rank() if is_enabled() else resolve(os.environ).local_rank
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {local_rank} needs a CUDA device of its own, but this machine has "
            f'{torch.cuda.device_count()}: start fewer processes per machine, or use the device "cpu"'
        )
    return torch.device("cuda", local_rank)


def _export(variables: dict[str, str], overwrite: bool) -> None:
    for name, value in variables.items():
        present = os.environ.get(name)
        if present and present != value and not overwrite:
            raise ConfigError(
                f"the environment variable {name} is {present!r} but the launcher gives {value!r}: unset it, "
                "or allow overwriting"
            )
    os.environ.update(variables)


def collective_device() -> torch.device:
    """Return the device a tensor must be on to take part in a collective."""
    if is_enabled() and dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def all_reduce_sum_(tensor: torch.Tensor) -> torch.Tensor:
    """Replace ``tensor`` by its sum over all processes and return it; unchanged without a group."""
    if is_enabled():
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


def all_reduce_max_(tensor: torch.Tensor) -> torch.Tensor:
    """Replace ``tensor`` by its elementwise maximum over all processes and return it."""
    if is_enabled():
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def broadcast_object(obj: T, src: int = 0) -> T:
    """Return the object that process ``src`` passed (any picklable value); ``obj`` itself without a group."""
    if not is_enabled():
        return obj
    box = [obj]
    dist.broadcast_object_list(box, src=src, device=collective_device())
    return box[0]


def all_gather_objects(obj: T) -> list[T]:
    """Return what every process passed (any picklable value), in the order of their ranks."""
    if not is_enabled():
        return [obj]
    gathered: list[T | None] = [None] * get_global_size()
    dist.all_gather_object(gathered, obj)
    return gathered


def barrier() -> None:
    """Wait until every process is here; returns at once without a group."""
    if is_enabled():
        dist.barrier()
