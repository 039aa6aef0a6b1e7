"""Which file of a folder, or of a repository, holds the weights; decided by names alone."""

import re
from collections.abc import Iterable
from pathlib import PurePosixPath

from dinov2.errors import some_of
from dinov2.models.checkpoint_names import checkpoint_name
from dinov2.models.shards import INDEX_SUFFIX

WEIGHT_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")
# As timm and transformers name the weights of a model, best first.
LIBRARY_FILES = (
    "model.safetensors",
    f"model.safetensors{INDEX_SUFFIX}",
    "pytorch_model.bin",
    f"pytorch_model.bin{INDEX_SUFFIX}",
)
NAMES_SHOWN = 5
SHARD = re.compile(r"-\d{5}-of-\d{5}\.")


def choose_file(names: Iterable[str], entry: str) -> str | None:
    """Return the name of the weight file, or None if there is none or no telling which.

    In this order: the export of a training, a file of timm or transformers, an export with the model farm's
    prefix if there is a single one, the only weight file.

    Args:
        names: File names of one folder.
        entry: ``teacher`` or ``student``.
    """
    names = sorted(names)
    exported = checkpoint_name(entry)
    for name in (exported, *LIBRARY_FILES):
        if name in names:
            return name
    for candidates in ([name for name in names if name.endswith(f"_{exported}")], weight_files(names)):
        if len(candidates) == 1:
            return candidates[0]
    return None


def weight_files(names: Iterable[str]) -> list[str]:
    """Return the names that belong to weight files."""
    return sorted(name for name in names if PurePosixPath(name).suffix in WEIGHT_SUFFIXES)


def no_choice(place: str, names: Iterable[str], entry: str) -> str:
    """Return the sentence for a place with no weight file, or several."""
    found = weight_files(names)
    shown = some_of(found, NAMES_SHOWN)
    if all(SHARD.search(name) for name in found) and found:
        return (
            f"{place} holds parts of a checkpoint ({shown}) without the index that says what is in which: "
            f"download the file that ends in {INDEX_SUFFIX} as well."
        )
    return (
        f"{place} has no {checkpoint_name(entry)}, no {LIBRARY_FILES[0]} and not exactly one weight file, "
        f"but {shown or 'no weight file at all'}: name the file to load."
    )
