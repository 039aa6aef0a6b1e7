"""The grammar of dataset strings: ``Name[:key=value]*``, e.g. ``ImageNet:split=TRAIN:root=/data:extra=/in``.

A key ends at the first ``=`` of its part, so a value may hold further ones. A value that holds ``:`` is put
in quotes (``root="/a:b"``, taken literally) or percent-encoded (``root=/a%3Ab``).

A mixture joins datasets by ``+``, each with a weight in front or without:
``2*Pathology:root=/a+NCTCRC:root=/b``. A ``+`` only separates where the name of a dataset stands behind it
(or a weight, ``*`` and a name) and then ``:``, ``+`` or the end, so a path may hold one: ``root=/stain_h+e``.
A value in which a ``+`` would separate, such as ``root="/old+NCTCRC"``, is put in quotes or percent-encoded
(``%2B``). Spaces around a separating ``+`` do not count. A weight is a positive decimal number: ``2``,
``0.5``, ``1e-3``.
"""

import re
from collections.abc import Iterable
from fractions import Fraction
from typing import NamedTuple
from urllib.parse import quote, unquote

from dinov2.errors import DatasetError, nearest

_QUOTES = "\"'"
_KEY = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_QUOTED_VALUE = r""":[A-Za-z_]\w*=(?:"[^"]*"|'[^']*')"""
_NUMBER = re.compile(r"(\d{1,15}(\.\d{0,15})?|\.\d{1,15})([eE]-?\d{1,2})?", re.ASCII)
# A plus that may have been meant to separate: something like a name, or a weight, stands behind it.
_UNSPLIT = re.compile(r"\+\s*(?:[^\s:+*/]*\*)?\s*([A-Za-z_]\w*)\s*(?=[:+]|$)", re.ASCII)
_HELP = 'write Name:key=value:key=value, and put a value that holds ":" in quotes, or write %3A for it'


class MixturePart(NamedTuple):
    """One dataset of a mixture: its dataset string and its weight, None if none is written."""

    dataset_str: str
    weight: Fraction | None


def split_mixture(text: str, names: Iterable[str]) -> list[MixturePart]:
    """Split a mixture into its parts; a dataset string without ``+`` is one part.

    Args:
        text: dataset strings joined by ``+``.
        names: of the datasets there are.

    Raises:
        DatasetError: a weight is no positive number.
    """
    name = "|".join(re.escape(name) for name in names)
    separator = rf"\s*\+\s*(?=(?:(?:[^\s:+*/=]*|\d+/\d+)\*\s*)?(?:{name})\s*(?:[:+]|$))"
    parts, begin = [], 0
    for match in re.finditer(f"{_QUOTED_VALUE}|({separator})", text, re.ASCII):
        if match[1] is not None:
            parts.append(text[begin : match.start()])
            begin = match.end()
    return [_take_weight(part) for part in [*parts, text[begin:]]]


def unsplit_part_hint(dataset_str: str, names: Iterable[str]) -> str:
    """Return what to add to the error of a part that holds a ``+``; empty where it holds none like it."""
    found = [match[1] for match in _UNSPLIT.finditer(re.sub(_QUOTED_VALUE, "", dataset_str))]
    if not found:
        return ""
    likeliest = next((name for name in found if nearest(name, names)), found[0])
    return (
        f'; the "+" before "{likeliest}" was taken as part of a value, because no dataset has this name'
        f"{nearest(likeliest, names)}"
    )


def nearest_spelling(name: str, names: Iterable[str]) -> str:
    """Return a hint at the dataset meant by an unknown name, also where the ``*`` of a weight is missing."""
    weight = _NUMBER.match(name)
    if weight and name[weight.end() :] in names:
        return f' (did you mean "{weight[0]}*{name[weight.end() :]}"?)'
    return nearest(name, names)


def _take_weight(part: str) -> MixturePart:
    head = part.partition(":")[0]
    weight, star, _ = head.partition("*")
    if not star:
        return MixturePart(part, None)
    number = Fraction(weight.strip()) if _NUMBER.fullmatch(weight.strip()) else Fraction(0)
    if number <= 0:
        raise DatasetError(
            f'the weight "{weight.strip()}" of "{part}" is no positive number: write a share '
            "such as 2*Name:... or 0.5*Name:..., or leave the part out"
        )
    return MixturePart(part[len(weight) + 1 :].strip(), number)


def parse_dataset_string(dataset_str: str) -> tuple[str, dict[str, str]]:
    """Split a dataset string into the dataset's name and its options.

    Raises:
        DatasetError: the string does not follow the grammar, or a key occurs twice.
    """
    name, colon, rest = str(dataset_str).partition(":")
    if not name.strip():
        raise DatasetError(f'the dataset string "{dataset_str}" names no dataset; {_HELP}')
    options: dict[str, str] = {}
    while colon:
        key, equals, rest = rest.partition("=")
        if not equals or not _KEY.fullmatch(key):
            part = (key + equals + rest).partition(":")[0]
            raise DatasetError(
                f'the part "{part}" of the dataset string "{dataset_str}" is no key=value; {_HELP}'
            )
        if key in options:
            raise DatasetError(
                f'the key "{key}" occurs twice in the dataset string "{dataset_str}"; give it once'
            )
        options[key], colon, rest = _take_value(key, rest, dataset_str)
    return name.strip(), options


def format_dataset_string(name: str, **options: object) -> str:
    """Write the dataset string that :func:`parse_dataset_string` reads back."""
    parts = [f"{key}={_encode(str(value))}" for key, value in options.items()]
    return ":".join([name, *parts])


def _take_value(key: str, rest: str, dataset_str: str) -> tuple[str, str, str]:
    """Split ``rest`` into a value, the colon behind it (or nothing) and what follows."""
    if not rest or rest[0] not in _QUOTES:
        value, colon, rest = rest.partition(":")
        return unquote(value, errors="surrogateescape"), colon, rest
    end = rest.find(rest[0], 1)
    if end < 0 or rest[end + 1 : end + 2] not in ("", ":"):
        raise DatasetError(
            f'the quoted value of "{key}" in the dataset string "{dataset_str}" does not end in {rest[0]} '
            "followed by : or the end of the string"
        )
    return rest[1:end], rest[end + 1 : end + 2], rest[end + 2 :]


def _encode(value: str) -> str:
    # A plus and a space at an end may mean something else beside the other parts of a mixture.
    plain = not set(":%+") & set(value) and value[:1] not in tuple(_QUOTES) and value == value.strip()
    return value if plain else quote(value, safe="/=,", errors="surrogateescape")
