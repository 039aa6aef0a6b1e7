"""Checks of what a dataset string hands to a dataset, each ending in one sentence."""

from enum import Enum
from pathlib import Path
from typing import TypeVar

from dinov2.errors import DatasetError, nearest

SplitT = TypeVar("SplitT", bound=Enum)


def existing_folder(path: str, *, dataset: str, key: str) -> str:
    """Return ``path`` if it is a folder.

    Raises:
        DatasetError: it is empty, missing or a file.
    """
    if not path or not Path(path).is_dir():
        raise DatasetError(f'the {key} of {dataset} is "{path}", which is no folder: give the path of one')
    return str(path)


def member_of(splits: type[SplitT], value: str | SplitT, *, dataset: str) -> SplitT:
    """Return the split of that name, in capitals or not.

    Raises:
        DatasetError: there is no such split.
    """
    if isinstance(value, splits):
        return value
    name = str(value).upper()
    if name not in splits.__members__:
        accepted = list(splits.__members__)
        raise DatasetError(
            f'{dataset} has no split "{value}"{nearest(name, accepted)}; accepted: {", ".join(accepted)}'
        )
    return splits[name]
