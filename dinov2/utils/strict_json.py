"""JSON that every reader accepts: the standard has no word for numbers that are not finite."""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any


def _null(_number: float) -> None:
    return None


def to_json(
    value: Any,
    indent: int | None = None,
    not_finite: Callable[[float], Any] = _null,
    default: Callable[[Any], Any] | None = None,
) -> str:
    """Return ``value`` as JSON; keys that JSON has no words for become texts.

    Args:
        value: to write.
        indent: of nested lines; None writes a single line.
        not_finite: what stands for a number that is infinite or not a number, such as the recall of a class
            without samples; null if nothing is said.
        default: what stands for an object that JSON can not express, see :func:`json.dumps`.

    Raises:
        TypeError: JSON can not express an object, and there is no ``default``.
    """

    def writable(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {_key(key): writable(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [writable(item) for item in value]
        return not_finite(value) if isinstance(value, float) and not math.isfinite(value) else value

    stand_in = None if default is None else lambda value: writable(default(value))
    return json.dumps(writable(value), indent=indent, allow_nan=False, default=stand_in)


def _key(key: Any) -> Any:
    return key if key is None or isinstance(key, str | int | float) else str(key)
