"""What to name in place of a folder that belongs to a training run and holds no file of weights itself."""

from pathlib import Path

from dinov2.models.checkpoint_names import EXPORT_FOLDER

EXPORTS = "eval"
OWN_FILES = {"manifest.json", "state.json"}


def advice(folder: Path) -> str:
    """Return what a run's folder, its ``eval`` or a checkpoint is, and what to name; "" for other folders."""
    names = _names(folder)
    if ".metadata" in names or any(name.endswith(".distcp") for name in names):
        return _about_checkpoint(folder, own=names.issuperset(OWN_FILES))
    newest = _newest_export(folder / EXPORTS) or _newest_export(folder)
    return f"is of a whole run: name one of its exports, such as {newest}" if newest else ""


def _about_checkpoint(folder: Path, own: bool) -> str:
    if not own:
        module = "torch.distributed.checkpoint"
        return (
            f"is a checkpoint of {module}: turn it into one file with "
            f'"python -m {module}.format_utils dcp_to_torch {folder} weights.pth" '
            "(or dcp_to_torch_save of that module) and name that file"
        )
    newest = _newest_export(folder.parent / EXPORTS)
    export = f"name an export of that run, such as {newest}, or " if newest else ""
    command = f'"python -m dinov2.fsdp.consolidate {folder} weights.pth"'
    return f"is a checkpoint of a run: {export}turn it into one file with {command} and name that file"


def _names(folder: Path) -> set[str]:
    try:
        return {path.name for path in folder.iterdir()}
    except OSError:
        return set()


def _newest_export(exports: Path) -> Path | None:
    matches = filter(None, map(EXPORT_FOLDER.fullmatch, _names(exports)))
    newest = max(matches, key=lambda match: int(match[1]), default=None)
    return exports / newest[0] if newest else None
