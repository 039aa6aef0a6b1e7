"""Checkpoints in several files with an index, as transformers and timm write large models."""

import json
from pathlib import Path, PurePosixPath

from dinov2.errors import WeightsError, some_of
from dinov2.models.integrity import damaged, is_file

INDEX_SUFFIX = ".index.json"
INDEX_BYTES = 1 << 26  # a table of a hundred thousand names has a tenth of this
NAMES_SHOWN = 5


def read_index(path: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """Return tensor name -> file that holds it, and the words of the index about itself.

    Raises:
        WeightsError: The file is no index, names files outside its folder, or some of them are missing.
    """
    table, metadata = read_table(path)
    files = {name: path.parent / name for name in sorted(set(table.values()))}
    missing = [name for name, file in files.items() if not is_file(file)]
    if missing:
        raise WeightsError(
            f'{len(missing)} of the {len(files)} files that "{path}" names are missing '
            f"({some_of(missing, NAMES_SHOWN)}): download or copy them into the same folder."
        )
    return {tensor: files[name] for tensor, name in table.items()}, metadata


def read_table(path: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Return tensor name -> name of its file, which need not exist yet, and the words of the index.

    Raises:
        WeightsError: The file is no index, or names files outside its folder.
    """
    if path.stat().st_size > INDEX_BYTES:
        raise damaged(path, f"an index of {path.stat().st_size} bytes")
    try:
        content = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise damaged(path, error) from error
    table = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
        raise WeightsError(
            f'"{path}" is not the index of a checkpoint: expected is an entry "weight_map" with the file of '
            "every tensor, as transformers writes it."
        )
    for name in sorted(set(table.values())):
        _check_inside(path, name)
    about = content.get("metadata") or {}
    metadata = {str(key): str(value) for key, value in about.items()} if isinstance(about, dict) else {}
    return table, metadata


def _check_inside(path: Path, name: str) -> None:
    """Raise if an index names a file that is not beside or below it, or another index."""
    parts = PurePosixPath(name.replace("\\", "/"))
    if parts.is_absolute() or not parts.parts or ".." in parts.parts or ":" in name or "\0" in name:
        raise WeightsError(
            f'The index "{path}" names the file "{name}", which is not in its own folder: it is not loaded.'
        )
    if name.endswith(INDEX_SUFFIX):
        raise WeightsError(f'The index "{path}" names another index, "{name}": it is not loaded.')
