"""Between live objects, whose tensors may be sharded, and what a checkpoint holds of them."""

import logging
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from dinov2 import distributed
from dinov2.errors import some_of

logger = logging.getLogger("dinov2")

PLAIN_TYPES = (type(None), bool, int, float, complex, str, bytes)


class Checkpointable(Protocol):
    """What can be stored beside the model: an optimizer, a scaler, meters."""

    def state_dict(self) -> Mapping[str, Any]: ...

    def load_state_dict(self, state_dict: Any) -> Any: ...


def gather(value: Any, name: str) -> Any:
    """Return ``value`` with whole tensors on the CPU, made of nothing that a safe load would refuse.

    Gathering a sharded tensor needs all processes, so every process walks through everything, in the same
    order; only the main process keeps the tensors, the others get None in their place.
    """
    if isinstance(value, torch.Tensor):
        whole = value.detach().full_tensor() if isinstance(value, DTensor) else value.detach()
        return _compact(whole.cpu()) if distributed.is_main_process() else None
    if isinstance(value, Mapping):
        return {key: gather(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        kind = list if isinstance(value, list) else tuple
        return kind(gather(item, f"{name}[{index}]") for index, item in enumerate(value))
    # The type itself and not a subclass: numpy's float64 is a float but cannot be loaded safely.
    assert type(value) in PLAIN_TYPES, (
        f"{name} is a {type(value).__name__}, which a safe load refuses: store tensors and plain values only"
    )
    return value


def _compact(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a view, which would otherwise drag its whole storage into the file."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def named_optimizer_state(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> dict[str, Any]:
    """Return the optimizer's state with parameters by name instead of by number.

    ``torch.distributed.checkpoint.state_dict`` does so, too, but it takes a step when there is no state yet.

    Args:
        optimizer: of parameters that all have a name.
        names: parameter -> name.
    """
    state = {names[parameter]: dict(values) for parameter, values in optimizer.state.items()}
    groups = [
        {**group, "params": [names[parameter] for parameter in group["params"]]}
        for group in optimizer.param_groups
    ]
    return {"state": state, "param_groups": groups}


def load_named_optimizer_state(
    optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str], stored: Mapping[str, Any]
) -> None:
    """Load the state of each parameter by its name, however parameters are grouped now.

    The options of the groups stay those of ``optimizer``: they are the present config's. A state of a
    parameter that is no longer trained is left out with a warning.

    Args:
        optimizer: of parameters that all have a name.
        names: parameter -> name.
        stored: what :func:`named_optimizer_state` returned.
    """
    members = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    numbers = {name: number for number, name in enumerate(members)}
    groups = [
        {**group, "params": [numbers[names[parameter]] for parameter in group["params"]]}
        for group in optimizer.param_groups
    ]
    foreign = stored["state"].keys() - numbers.keys()
    if foreign:
        logger.warning(
            "the optimizer's state of parameters that are not trained now is left out: %s",
            some_of(sorted(foreign), 3),
        )
    new = numbers.keys() - {name for group in stored["param_groups"] for name in group["params"]}
    if new:
        logger.warning(
            "parameters that were not trained before start without an optimizer's state: %s",
            some_of(sorted(new), 3),
        )
    state = {numbers[name]: values for name, values in stored["state"].items() if name in numbers}
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def numbered_optimizer_state(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return a named state in PyTorch's own form, parameters numbered in the order of their groups."""
    members = [name for group in stored["param_groups"] for name in group["params"]]
    numbers = {name: number for number, name in enumerate(members)}
    groups = [
        {**group, "params": [numbers[name] for name in group["params"]]} for group in stored["param_groups"]
    ]
    return {
        "state": {numbers[name]: values for name, values in stored["state"].items()},
        "param_groups": groups,
    }


def load_model(model: nn.Module, stored: dict[str, torch.Tensor]) -> None:
    """Load whole tensors strictly into ``model``, sharded or not."""
    present = model.state_dict()
    model.load_state_dict({name: _shard_like(value, present.get(name)) for name, value in stored.items()})


def load_checkpointable(target: Checkpointable, stored: Any) -> None:
    """Load a stored state into ``target``; for an optimizer of sharded parameters shard it as they are."""
    if isinstance(target, torch.optim.Optimizer):
        # An optimizer numbers its parameters in the order of its groups. Numbers beyond them are left for
        # load_state_dict to complain about.
        parameters = dict(enumerate(p for group in target.param_groups for p in group["params"]))
        groups = stored["param_groups"]
        if len(groups) == len(target.param_groups):
            # The options stay: they are the present config's.
            groups = [
                own | {"params": saved["params"]}
                for own, saved in zip(target.param_groups, groups, strict=True)
            ]
        stored = stored | {
            "param_groups": groups,
            "state": {
                index: {key: _shard_like(value, parameters.get(index)) for key, value in values.items()}
                for index, values in stored["state"].items()
            },
        }
    target.load_state_dict(stored)


def _shard_like(stored: Any, present: Any) -> Any:
    """Shard a stored whole tensor in the way in which ``present`` is sharded."""
    if isinstance(present, DTensor) and isinstance(stored, torch.Tensor) and stored.shape == present.shape:
        # Every process has read the whole tensor, so none needs to send it.
        return distribute_tensor(
            stored.to(present.device), present.device_mesh, present.placements, src_data_rank=None
        )
    return stored
