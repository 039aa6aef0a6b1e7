"""From the file names of a slide folder to the numbers of its tiles, and back."""

import re
from typing import NamedTuple

import numpy as np

SUFFIXES = (".jpeg", ".jpg", ".png")  # the first is the forks' and the default
LARGEST_NUMBER = np.iinfo(np.uint32).max
NOT_A_TILE = f"the name is not <slide>_patch_<number>({'|'.join(SUFFIXES)})"
TOO_LARGE = f"the number is above {LARGEST_NUMBER}"

MOST_DIGITS = len(str(LARGEST_NUMBER))
_NUMBER = re.compile(r"0|[1-9][0-9]*")


class TileNames(NamedTuple):
    """What the names of a slide folder say.

    Attributes:
        suffix: of the tiles.
        numbers: of the tiles, sorted, uint32.
        skipped: (name, reason) of every other file.
    """

    suffix: str
    numbers: np.ndarray
    skipped: list[tuple[str, str]]


def tile_name(slide: str, number: int, suffix: str = SUFFIXES[0]) -> str:
    """Return the file name of a tile."""
    return f"{slide}_patch_{number}{suffix}"


def parse_names(slide: str, names: list[str]) -> TileNames:
    """Sort the file names of a slide folder into tiles and others.

    A tile's name must be the one that :func:`tile_name` makes of its number, as the index keeps that alone;
    and all tiles of a slide have one suffix, the commonest.
    """
    prefix = f"{slide}_patch_"
    numbers: dict[str, dict[str, int]] = {suffix: {} for suffix in SUFFIXES}
    skipped = []
    for name in names:
        stem, dot, suffix = name.rpartition(".")
        digits = stem[len(prefix) :]
        if dot + suffix not in numbers or not stem.startswith(prefix) or not _NUMBER.fullmatch(digits):
            skipped.append((name, NOT_A_TILE))
        elif len(digits) > MOST_DIGITS or int(digits) > LARGEST_NUMBER:
            skipped.append((name, TOO_LARGE))
        else:
            numbers[dot + suffix][name] = int(digits)
    common = max(SUFFIXES, key=lambda suffix: len(numbers[suffix]))
    others = [name for suffix in SUFFIXES if suffix != common for name in numbers[suffix]]
    skipped += [(name, f"most tiles of its slide end in {common}") for name in others]
    return TileNames(common, np.array(sorted(numbers[common].values()), dtype=np.uint32), sorted(skipped))
