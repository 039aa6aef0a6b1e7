"""Which files hold the heads, the backbones and the centres that ``head.head_path`` names.

A folder as a run exports it (``eval/training_<iteration>``) or as the model farm on Zenodo offers it, where
every name carries a prefix such as ``dinov2_vits_NCT_10k_training_1999_``; or one file, beside which the
files of the other network are looked for.
"""

from dataclasses import dataclass
from pathlib import Path

from dinov2.errors import WeightsError
from dinov2.models.head_weights import find_head
from dinov2.models.sources import locate
from dinov2.models.weight_files import open_file

NETWORKS = ("student", "teacher")
HEADS = ("dino_head", "ibot_head")
CENTERS_FILE = "centers_checkpoint.pth"


def checkpoint_name(part: str) -> str:
    """Return the file name of an exported part, e.g. ``teacher`` or ``student_dino_head``."""
    return f"{part}_checkpoint.pth"


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
    heads: dict[str, Path]
    backbones: dict[str, Path]
    centers: Path | None

    @property
    def has_both_backbones(self) -> bool:
        """Whether student and teacher can be restored separately, as for continuing a run."""
        return len(self.backbones) == len(NETWORKS)


def find_files(head_path: str) -> ContinuedFiles:
    """Look up the files that ``head.head_path`` names.

    Raises:
        WeightsError: there is nothing at the path, or two files claim to be the same part.
    """
    path = Path(head_path).expanduser()
    if path.is_dir():
        folder, prefix = path, None
    elif path.is_file():
        folder, prefix = path.parent, _prefix(path)
    elif path.exists() or not _is_remote(head_path):
        raise WeightsError(
            f"head.head_path is {head_path!r}, where there is neither a folder nor a file: name a folder "
            "such as eval/training_9999 that holds student_dino_head_checkpoint.pth and its teacher "
            "counterpart, or one of the two files."
        )
    else:
        path = locate(head_path)
        folder, prefix = path.parent, _prefix(path)

    def file_of(part: str) -> Path | None:
        return _one_file(folder, checkpoint_name(part), prefix)

    backbones = {network: file for network in NETWORKS if (file := file_of(network))}
    heads = {f"{network}_{head}": file_of(f"{network}_{head}") for network in NETWORKS for head in HEADS}
    if path.is_file():
        _add_named_file(path, heads)
    for key, file in heads.items():
        whole = backbones.get(key.partition("_")[0])
        if file is None and whole is not None and find_head(open_file(whole).content, key):
            heads[key] = whole  # beside the backbone
    return ContinuedFiles(
        place=head_path,
        heads={key: file for key, file in heads.items() if file},
        backbones=backbones,
        centers=_one_file(folder, CENTERS_FILE, prefix),
    )


def _is_remote(source: str) -> bool:
    return ":" in source


def _prefix(path: Path) -> str | None:
    """Return what stands before the part's name in an exported file's name; None for another name."""
    parts = [f"{network}_{head}" for network in NETWORKS for head in HEADS] + list(NETWORKS)
    return next(
        (
            path.name.removesuffix(checkpoint_name(part))
            for part in parts
            if path.name.endswith(checkpoint_name(part))
        ),
        None,
    )


def _one_file(folder: Path, name: str, prefix: str | None) -> Path | None:
    """Return the file of a name, with a known prefix, with none, or with any that only one file has."""
    if prefix is not None:
        path = folder / f"{prefix}{name}"
        return path if path.is_file() else None
    if (folder / name).is_file():
        return folder / name
    found = sorted(path for path in folder.glob(f"*_{name}") if path.is_file())
    if len(found) > 1:
        raise WeightsError(
            f'The folder "{folder}" holds several files that end in {name} ({found[0].name}, '
            f"{found[1].name}): put those that belong together into a folder of their own, or name "
            "one of them."
        )
    return found[0] if found else None


def _add_named_file(path: Path, heads: dict[str, Path | None]) -> None:
    """Take every head that stands in the one file named, whatever the file is called."""
    content = open_file(path).content
    for key in heads:
        if heads[key] is None and isinstance(content.get(key), dict):
            heads[key] = path
