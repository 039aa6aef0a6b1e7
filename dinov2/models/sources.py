"""From what a user names (a path, a folder, an address, a name of some library) to a local file."""

import re
import urllib.parse
import urllib.request
from pathlib import Path

from dinov2.errors import WeightsError, nearest
from dinov2.models.downloads import REMOTE_SCHEMES, fetch
from dinov2.models.folders import choose_file, no_choice
from dinov2.models.hf_hub import fetch_from_hub
from dinov2.models.integrity import check_digest, require_file
from dinov2.models.releases import RELEASE_URLS, fetch_release
from dinov2.models.run_folders import advice
from dinov2.models.shards import INDEX_SUFFIX
from dinov2.models.zenodo import farm_file, fetch_from_zenodo

ACCEPTED_SOURCES = (
    "a path to a .pth, .pt, .bin, .safetensors or .index.json file, a folder with one, a file:, http: or "
    "https: address, hub:dinov2_vits14 or another release of DINOv2, hf-hub:owner/name, "
    "zenodo:<record>/<file>, or the name of a file of the model farm, each with #sha256=<checksum> behind it "
    "where wanted"
)
NAMED = ("hub", "hf-hub", "zenodo")
SPELLINGS = {"hf_hub": "hf-hub"}  # timm's older one
SHA256 = re.compile(r"[0-9a-fA-F]{64}")


def locate(source: str, *, entry: str | None = None) -> Path:
    """Return the local file that ``source`` names, fetching it first where need be.

    A checkpoint in several files is returned as its index, with all of them beside it.

    Args:
        source: One of :data:`ACCEPTED_SOURCES`.
        entry: ``teacher`` or ``student``: which of a folder's checkpoints is meant (default teacher).

    Raises:
        DownloadError: It is not on this machine and cannot be fetched.
        WeightsError: There is no such file, or it has another checksum.
    """
    name, sha256 = _split_checksum(str(source))
    if not name.strip():  # as a path it would be the current folder
        raise WeightsError(f"No weights are named: accepted is {ACCEPTED_SOURCES}.")
    scheme, _, rest = name.partition(":")
    scheme = SPELLINGS.get(scheme.lower(), scheme.lower())
    entry = entry or "teacher"
    if scheme in REMOTE_SCHEMES:
        return fetch(name, sha256=sha256)
    if scheme == "hub":
        return fetch_release(rest, sha256=sha256)
    if scheme == "zenodo":
        return fetch_from_zenodo(rest, sha256=sha256)
    path = fetch_from_hub(rest, entry=entry) if scheme == "hf-hub" else _local(name, entry)
    if sha256:
        if path.name.endswith(INDEX_SUFFIX):
            raise WeightsError(
                f'"{name}" is a checkpoint in several files, which one checksum cannot cover: leave #sha256= '
                "out and put a .sha256 file beside each of them."
            )
        check_digest(path, sha256, name)
    return path


def _split_checksum(source: str) -> tuple[str, str | None]:
    """Return the source without its checksum, and the checksum."""
    name, mark, digits = source.rpartition("#sha256=")
    if mark:
        if not SHA256.fullmatch(digits):
            raise WeightsError(
                f'The checksum "{digits}" behind {name} is not a SHA-256: expected are 64 hexadecimal '
                "digits, as sha256sum prints them."
            )
        return name, digits.lower()
    fragment = urllib.parse.urlsplit(source).fragment if "://" in source else ""
    if "=" in fragment:  # to drop a checksum that is not understood would pretend to have compared it
        raise WeightsError(
            f'"#{fragment}" behind {source.partition("#")[0]} is not understood: accepted is '
            "#sha256=<checksum>."
        )
    return source, None


def _local(name: str, entry: str) -> Path:
    """Return the file at a path or ``file:`` address, in a folder, or in the cache of the model farm."""
    address = urllib.parse.urlsplit(name) if name.lower().startswith("file:") else None
    if address and address.netloc not in ("", "localhost"):
        raise WeightsError(
            f'"{name}" is on another machine, {address.netloc}: mount its disk and give the path, or use '
            "https://."
        )
    path = Path(urllib.request.url2pathname(address.path)) if address else Path(name).expanduser()
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        found = farm_file(name)
        if found is None:
            raise WeightsError(_unknown(name)) from error
        return found
    except (OSError, ValueError):  # ValueError: a character that no path has
        require_file(path)
    if not path.is_dir():
        require_file(path)
        return path
    return _in_folder(path, entry)


def _in_folder(folder: Path, entry: str) -> Path:
    try:
        names = [path.name for path in folder.iterdir() if not path.is_dir()]
    except OSError as error:
        raise WeightsError(f'The folder "{folder}" cannot be read ({error.strerror}).') from error
    chosen = choose_file(names, entry)
    if chosen is not None:
        require_file(folder / chosen)
        return folder / chosen
    if instead := advice(folder):
        raise WeightsError(f'The folder "{folder}" {instead}.')
    raise WeightsError(no_choice(f'The folder "{folder}"', names, entry))


def _unknown(name: str) -> str:
    """Return the sentence for something that is neither a file nor a name of any kind."""
    scheme, mark, rest = name.partition(":")
    if scheme.lower() == "file":
        hint, subject = "", f'There is no file at "{name}"'
    elif "://" in name or (mark and len(scheme) > 1 and "/" not in scheme and "\\" not in scheme):
        hint = nearest(scheme, [*NAMED, *REMOTE_SCHEMES, "file"])
        subject = f'Cannot load weights from "{name}"'
    else:
        hint = nearest(f"hub:{name}", [f"hub:{release}" for release in RELEASE_URLS])
        if not hint and re.fullmatch(r"[\w-]+/[\w-]+", name):
            hint = f' (did you mean "hf-hub:{name}"?)'
        subject = f'The weight file "{name}" does not exist'
    return f"{subject}{hint}: accepted is {ACCEPTED_SOURCES}."
