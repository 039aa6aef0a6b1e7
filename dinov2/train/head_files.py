"""Which files hold the heads, the backbones and the centres that ``head.head_path`` names.

A folder as a run exports it (``eval/training_<iteration>``) or as the model farm on Zenodo offers it, where
every name carries a prefix such as ``dinov2_vits_NCT_10k_training_1999_``; one file of such an export, which
the others of the same prefix belong to; or any other file, which stands for itself alone.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from dinov2.errors import WeightsError
from dinov2.models.checkpoint_names import (
    CENTERS,
    FARM_NAME,
    HEAD_KEYS,
    HEADS,
    NETWORKS,
    checkpoint_name,
    split_name,
)
from dinov2.models.head_weights import find_head
from dinov2.models.sources import locate
from dinov2.models.weight_files import OpenedFile, open_file

logger = logging.getLogger("dinov2")

Parts = dict[str, Path]  # by part of an export, e.g. "teacher" or "student_dino_head"


@dataclass(frozen=True)
class ContinuedFiles:
    """What was found where ``head.head_path`` points to.

    Attributes:
        place: The path as it was given.
        heads: Files by ``<network>_<head>``, e.g. ``student_dino_head``.
        backbones: Files of whole networks by ``student`` and ``teacher``; a release of heads alone has none.
        centers: File of the losses' centres, if there is one.
    """

    place: str
    heads: Parts
    backbones: Parts
    centers: Path | None
    _opened: dict[Path, OpenedFile] = field(default_factory=dict, repr=False)

    @property
    def has_both_backbones(self) -> bool:
        """Whether student and teacher can be restored separately, as for continuing a run."""
        return len(self.backbones) == len(NETWORKS)

    def open(self, path: Path) -> OpenedFile:
        """Return a file's content; to open and check a file of gigabytes takes a while, so it is kept."""
        if path not in self._opened:
            self._opened[path] = open_file(path)
        return self._opened[path]


def find_files(head_path: str, wanted: Iterable[str] = HEADS) -> ContinuedFiles:
    """Look up the files that ``head.head_path`` names.

    Args:
        head_path: A folder, or a source as :func:`dinov2.models.sources.locate` takes it.
        wanted: The heads that are going to be loaded. A file is only opened to look for one of them that
            has no file of its own.

    Raises:
        WeightsError: there is nothing at the path, it cannot be fetched, or a folder holds several exports.
    """
    wanted_keys = [key for key in HEAD_KEYS if key.partition("_")[2] in set(wanted)]
    name = head_path.partition("#sha256=")[0]
    local = _existing(name)
    if local and local.is_dir() and name == head_path:
        return _with_heads_inside(head_path, _only_export(local), None, wanted_keys)
    if not (local or ":" in name or FARM_NAME.fullmatch(name)):
        raise WeightsError(
            f"head.head_path is {head_path!r}, where there is neither a folder nor a file: name a folder "
            "such as eval/training_9999 that holds student_dino_head_checkpoint.pth and its teacher "
            "counterpart, or one of the two files."
        )
    path = locate(head_path)
    split, parts = split_name(path.name), {}
    if split and (local or name.lower().startswith("file:")):
        parts = _exports(path.parent)[split[0]]
    elif split:
        parts = _fetched(name, path, wanted_keys)
    return _with_heads_inside(head_path, parts, path, wanted_keys)


def _existing(name: str) -> Path | None:
    try:
        path = Path(name).expanduser()
        return path if path.exists() else None
    except (OSError, ValueError, RuntimeError):  # a name that no path can have, a home that is nobody's
        return None


def _exports(folder: Path) -> dict[str, Parts]:
    """Return the files of every export in a folder, by their prefix and part."""
    exports: dict[str, Parts] = {}
    try:
        files = sorted(path for path in folder.iterdir() if path.is_file())
    except OSError as error:
        raise WeightsError(f'The folder "{folder}" cannot be read ({error.strerror}).') from error
    for path in files:
        found = split_name(path.name)
        if found:
            exports.setdefault(found[0], {})[found[1]] = path
    return exports


def _only_export(folder: Path) -> Parts:
    exports = list(_exports(folder).values())
    if len(exports) > 1:
        examples = ", ".join(next(iter(parts.values())).name for parts in exports[:3])
        raise WeightsError(
            f'The folder "{folder}" holds files of several exports ({examples}): put those that belong '
            "together into a folder of their own, or name one of them."
        )
    return exports[0] if exports else {}


def _fetched(source: str, path: Path, wanted_keys: list[str]) -> Parts:
    """Return a file that is no local one, and what else of its export is needed, fetched from beside it.

    What happens to lie beside it in a cache is left alone. The other network's file has to be there; other
    heads, and the centres beside a network, may be missing.
    """
    prefix, part = split_name(path.name)

    def fetch(other: str) -> Path:
        if checkpoint_name(part) in source:
            return locate(source.replace(checkpoint_name(part), checkpoint_name(other)))
        return locate(f"{source}:{prefix}{checkpoint_name(other)}")  # a repository, of which part was chosen

    network, mark, head = part.partition("_")
    parts = {part: path}
    if network not in NETWORKS:
        return parts
    other = next(name for name in NETWORKS if name != network)
    parts[f"{other}{mark}{head}"] = fetch(f"{other}{mark}{head}")
    for more in (key for key in (wanted_keys if head else [CENTERS]) if key not in parts):
        try:
            parts[more] = fetch(more)
        except WeightsError as error:
            logger.warning("%s, which belongs to %s, was not found: %s", checkpoint_name(more), source, error)
    return parts


def _with_heads_inside(
    place: str, parts: Parts, named: Path | None, wanted_keys: list[str]
) -> ContinuedFiles:
    """Add the heads that stand inside the named file, and those inside the files of whole networks."""
    files = ContinuedFiles(
        place=place,
        heads={key: parts[key] for key in HEAD_KEYS if key in parts},
        backbones={network: parts[network] for network in NETWORKS if network in parts},
        centers=parts.get(CENTERS),
    )
    if named is not None and wanted_keys:
        content = files.open(named).content
        files.heads.update({key: named for key in HEAD_KEYS if find_head(content, key, bare=False)})
    lacking = {key.partition("_")[0] for key in wanted_keys if key not in files.heads}
    for network in lacking & files.backbones.keys():
        whole = files.backbones[network]
        for key in (key for key in HEAD_KEYS if key not in files.heads and key.startswith(network)):
            if find_head(files.open(whole).content, key, bare=False):
                files.heads[key] = whole
    return files
