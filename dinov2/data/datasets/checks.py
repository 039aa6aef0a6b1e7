"""Checks of what a dataset string hands to a dataset, each ending in one sentence."""

from enum import Enum
from pathlib import Path
from typing import TypeVar

from dinov2.data.datasets.path_map import mapped_from
from dinov2.errors import DatasetError, nearest

SplitT = TypeVar("SplitT", bound=Enum)


def existing_folder(path: str, *, dataset: str, key: str, recorded: str = "") -> str:
    """Return ``path`` if it is a folder; ``recorded`` is what it was before a path map.

    Raises:
        DatasetError: it is empty, missing or a file.
    """
    if not path or not Path(path).is_dir():
        origin = mapped_from(recorded or path, path)
        raise DatasetError(
            f'the {key} of {dataset} is "{path}"{origin}, which is no folder: give the path of one'
            f"{_hint(path, recorded)}"
        )
    return str(path)


def _hint(path: str, recorded: str) -> str:
    if path.rstrip().endswith("+"):
        return ', and leave out the "+" at its end, behind which another dataset would have to follow'
    if recorded:  # by a file, perhaps on another machine
        return ", or say with path_map (train.path_map in a config) where recorded folders lie here"
    return ""


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
