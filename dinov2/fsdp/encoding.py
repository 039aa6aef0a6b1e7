"""Nested state as tensors by name, and a JSON text of everything else: nothing that reading could execute.

Of a value only ``None``, booleans, numbers, strings, bytes, lists, tuples, mappings and tensors are stored.
What JSON lacks is written as an object with one key that begins with a dollar sign.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

# The type itself and not a subclass: numpy's float64 is a float but would not come back as it was.
PLAIN_TYPES = (type(None), bool, int, str)
# Dimensionless tensors on the CPU, such as an optimizer's counts of steps, are numbers in the text.
SCALAR_TYPES = {
    str(dtype): dtype for dtype in (torch.float32, torch.float64, torch.int64, torch.int32, torch.bool)
}


def encode(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Return what :func:`decode` turns into ``value`` again, and add its tensors to ``tensors``.

    Args:
        value: nested plain values and tensors; anything else is a mistake in the program.
        name: of the value, for the names of its tensors.
        tensors: name -> tensor as it is, not copied.
    """
    if isinstance(value, torch.Tensor):
        is_number = value.dim() == 0 and value.device.type == "cpu" and type(value) is torch.Tensor
        if is_number and str(value.dtype) in SCALAR_TYPES:
            return {"$scalar": [str(value.dtype), encode(value.item(), name, tensors)]}
        assert name not in tensors, f"two tensors are called {name}"
        tensors[name] = value.detach()
        return {"$tensor": name}
    if isinstance(value, Mapping):
        if all(type(key) is str and not key.startswith("$") for key in value):
            return {key: encode(item, f"{name}.{key}", tensors) for key, item in value.items()}
        items = [[encode(k, name, tensors), encode(v, f"{name}.{k}", tensors)] for k, v in value.items()]
        return {"$items": items}
    if isinstance(value, (list, tuple)):
        items = [encode(item, f"{name}[{index}]", tensors) for index, item in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if type(value) is float:
        return value if math.isfinite(value) else {"$float": str(value)}
    if type(value) is complex:
        return {"$complex": str(value)}
    if type(value) is bytes:
        return {"$bytes": value.hex()}
    assert type(value) in PLAIN_TYPES, (
        f"{name} is a {type(value).__name__}, which a safe load refuses: store tensors and plain values only"
    )
    return value


def decode(coded: Any, tensor: Callable[[str], Any]) -> Any:
    """Return the value that :func:`encode` was given.

    Args:
        coded: what it returned, after its way through JSON.
        tensor: returns the tensor of a name.

    Raises:
        KeyError, TypeError, ValueError: it is something else.
    """
    if isinstance(coded, list):
        return [decode(item, tensor) for item in coded]
    if not isinstance(coded, dict):
        return coded
    kind = next(iter(coded), "")
    if not kind.startswith("$"):
        return {key: decode(item, tensor) for key, item in coded.items()}
    (content,) = coded.values()
    return _SPECIAL[kind](content, tensor)


_SPECIAL: dict[str, Callable[[Any, Callable[[str], Any]], Any]] = {
    "$tensor": lambda content, tensor: tensor(content),
    "$scalar": lambda content, tensor: torch.tensor(
        decode(content[1], tensor), dtype=SCALAR_TYPES[content[0]]
    ),
    "$items": lambda content, tensor: {decode(k, tensor): decode(v, tensor) for k, v in content},
    "$tuple": lambda content, tensor: tuple(decode(item, tensor) for item in content),
    "$float": lambda content, _: float(content),
    "$complex": lambda content, _: complex(content),
    "$bytes": lambda content, _: bytes.fromhex(content),
}
