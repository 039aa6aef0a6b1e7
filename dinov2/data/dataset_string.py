"""The grammar of dataset strings: ``Name[:key=value]*``, e.g. ``ImageNet:split=TRAIN:root=/data:extra=/in``.

A key ends at the first ``=`` of its part, so a value may hold further ones. A value that holds ``:`` is put
in quotes (``root="/a:b"``, taken literally) or percent-encoded (``root=/a%3Ab``).
"""

import re
from urllib.parse import quote, unquote

from dinov2.errors import DatasetError

_QUOTES = "\"'"
_KEY = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_HELP = 'write Name:key=value:key=value, and put a value that holds ":" in quotes'


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
    plain = ":" not in value and "%" not in value and value[:1] not in tuple(_QUOTES)
    return value if plain else quote(value, safe="/=,", errors="surrogateescape")
