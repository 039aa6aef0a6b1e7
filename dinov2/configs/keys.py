"""How one config key is described: what kind of value it takes, which values, in which unit, and why.

`schema.py` states the keys with :func:`setting`; `checks.py` tests values against them.
"""

import dataclasses
import math
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

KIND_NAMES = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
    list: "a list of strings",
    dict: "a mapping of strings to strings",
}
NUMBER_WORDS = {2: "two", 3: "three", 4: "four"}  # lengths of the lists that keys take


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What is known about a key besides its type and default; the fields are those of :func:`setting`."""

    meaning: str
    unit: str = ""
    choices: tuple[str, ...] = ()
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    pattern: str = ""
    pattern_words: str = ""


def setting(default: Any, meaning: str, **rule: Any) -> Any:
    """Declare a config key as a dataclass field.

    Args:
        default: The default value, equal to the one in ``ssl_default_config.yaml``.
        meaning: One line for the reader of ``docs/configuration.md``.
        **rule: The other fields of :class:`Rule`: ``unit``; ``choices`` of a string; the bounds
            ``at_least``, ``above``, ``at_most``, ``below``; ``pattern`` (a regular expression for the
            whole string) and ``pattern_words`` (the same in words).
    """
    metadata = {"rule": Rule(meaning=meaning, **rule)}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class WrongValueError(ValueError):
    """A value is not what its key takes; the text goes on after the key's name."""


@dataclass(frozen=True, kw_only=True)
class Key:
    """One config key, e.g. ``optim.base_lr``."""

    path: str
    default: Any
    kinds: tuple[type, ...]
    nullable: bool
    rule: Rule

    @property
    def type_name(self) -> str:
        special = {list: "list of str", dict: "mapping of str to str"}
        names = [
            f"list of {len(self.default)} floats" if kind is tuple else special.get(kind, kind.__name__)
            for kind in self.kinds
        ]
        return " or ".join([*names, "null"] if self.nullable else names)

    @property
    def takes_text(self) -> bool:
        """Whether the value is free text, one of several words, or a list of such."""
        return str in self.kinds and set(self.kinds) <= {str, list}

    @property
    def bounds(self) -> str:
        """The accepted range in words, e.g. ``at least 0 and below 1``; empty when unbounded."""
        words = [
            f"{word.replace('_', ' ')} {getattr(self.rule, word):g}"
            for word in ("at_least", "above", "at_most", "below")
            if getattr(self.rule, word) is not None
        ]
        return " and ".join(words)

    @property
    def wanted(self) -> str:
        """What the key takes, in words that fit before ``is wanted``."""
        if self.rule.choices:
            words = "one of " + ", ".join(f'"{choice}"' for choice in self.rule.choices)
        else:
            words = self.rule.pattern_words or " or ".join(map(self._kind_name, self.kinds))
        if self.bounds:
            words += (" of " if self.bounds.startswith("at") else " ") + self.bounds
        return words + " or null" if self.nullable else words

    def _kind_name(self, kind: type) -> str:
        if kind is tuple:
            return f"a list of {NUMBER_WORDS[len(self.default)]} numbers"
        return KIND_NAMES[kind]

    def convert(self, value: Any) -> Any:
        """Return ``value`` in the key's own type.

        An integer is taken for a float and an integral float (``1e3``) for an integer, nothing else is
        converted: a quoted number stays a string, and 0 and 1 are not booleans.

        Raises:
            WrongValueError: The value is of another kind, or not an accepted one.
        """
        if value is None and self.nullable:
            return None
        for kind in self.kinds:
            converted = self._as_numbers(value) if kind is tuple else _as_kind(value, kind)
            if converted is not None and self._accepts(converted):
                return converted
        form = (
            ', such as "{/recorded: /here}"' if dict in self.kinds and self.path.endswith("path_map") else ""
        )
        raise WrongValueError(f"is {describe(value)}, {self.wanted} is wanted{form}")

    def _as_numbers(self, value: Any) -> list[float] | None:
        """Return a list of as many floats as the default has, None when it is not one."""
        numbers = [_as_kind(item, float) for item in value] if isinstance(value, list) else []
        return numbers if len(numbers) == len(self.default) and None not in numbers else None

    def _accepts(self, value: Any) -> bool:
        if isinstance(value, dict) or (isinstance(value, list) and list in self.kinds):
            return True
        if isinstance(value, str):
            known = not self.rule.choices or value in self.rule.choices
            return known and (not self.rule.pattern or re.fullmatch(self.rule.pattern, value) is not None)
        return all(self._in_bounds(number) for number in (value if isinstance(value, list) else [value]))

    def _in_bounds(self, number: float) -> bool:
        rule = self.rule
        return (
            math.isfinite(number)
            and (rule.at_least is None or number >= rule.at_least)
            and (rule.above is None or number > rule.above)
            and (rule.at_most is None or number <= rule.at_most)
            and (rule.below is None or number < rule.below)
        )


def _as_kind(value: Any, kind: type) -> Any:
    """Return ``value`` as a ``kind``, None when it is not one."""
    if kind in (bool, str):
        return value if isinstance(value, kind) else None
    if kind in (list, dict):
        items = [*value, *value.values()] if isinstance(value, dict) else value
        holds_text = isinstance(value, kind) and all(isinstance(item, str) for item in items)
        return value if holds_text and (items or kind is dict) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if kind is int:
        return int(value) if isinstance(value, int) or value.is_integer() else None
    return float(value)


def describe(value: Any) -> str:
    """Name a value and its kind for an error message."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"the boolean {str(value).lower()}"
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, str):
        return f"the string '{value}'"
    if isinstance(value, list):
        return f"the list {value}"
    return f"the mapping {value}" if isinstance(value, dict) else f"a {type(value).__name__}"


def iterate_keys(section: Any, prefix: str = "") -> Iterator[Key]:
    """Yield every key below a schema dataclass instance, in the order of declaration."""
    for field in dataclasses.fields(section):
        path, default = f"{prefix}{field.name}", getattr(section, field.name)
        if dataclasses.is_dataclass(default):
            yield from iterate_keys(default, f"{path}.")
            continue
        is_union = typing.get_origin(field.type) in (types.UnionType, typing.Union)
        members = typing.get_args(field.type) if is_union else (field.type,)
        kinds = tuple(typing.get_origin(m) or m for m in members if m is not types.NoneType)
        yield Key(
            path=path,
            default=list(default) if isinstance(default, tuple) else default,
            kinds=kinds,
            nullable=types.NoneType in members,
            rule=field.metadata["rule"],
        )
