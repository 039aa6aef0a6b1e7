"""From what a user names (a path, a folder, an address) to a local file."""

import urllib.parse
import urllib.request
from pathlib import Path

from dinov2.errors import WeightsError
from dinov2.models.downloads import REMOTE_SCHEMES, fetch

WEIGHT_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")
ACCEPTED_SOURCES = (
    "a path to a .pth, .pt or .safetensors file, a folder with one, or a file:, http: or https: address"
)


def locate(source: str, *, entry: str | None = None) -> Path:
    """Return the local file that ``source`` names, downloading it if it is an address.

    Args:
        source: Path, folder or address.
        entry: ``teacher`` or ``student``: which of a folder's checkpoints is meant (default teacher).

    Raises:
        WeightsError: There is no such file.
    """
    source = str(source)
    address = urllib.parse.urlsplit(source)
    if address.scheme in REMOTE_SCHEMES:
        return fetch(source)
    if address.scheme == "file":
        path = Path(urllib.request.url2pathname(address.path))
    elif "://" in source:
        raise WeightsError(f'Cannot load weights from "{source}": accepted is {ACCEPTED_SOURCES}.')
    else:
        path = Path(source).expanduser()
    if path.is_dir():
        return _file_in_folder(path, entry or "teacher")
    if not path.is_file():
        raise WeightsError(f'The weight file "{source}" does not exist: accepted is {ACCEPTED_SOURCES}.')
    return path


def _file_in_folder(folder: Path, entry: str) -> Path:
    """Return ``{entry}_checkpoint.pth`` of a training output, or else the only weight file of the folder."""
    exported = folder / f"{entry}_checkpoint.pth"
    if exported.is_file():
        return exported
    candidates = sorted(path for path in folder.iterdir() if path.suffix in WEIGHT_SUFFIXES)
    if len(candidates) == 1:
        return candidates[0]
    found = ", ".join(path.name for path in candidates[:5]) or "no weight file at all"
    raise WeightsError(
        f'The folder "{folder}" has no {exported.name} and not exactly one weight file, but {found}: '
        "name the file to load."
    )
