"""Files of a Zenodo record, and names of the ISBI 2024 model farm that is kept there."""

import json
import logging
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from dinov2.errors import WeightsError, nearest, some_of
from dinov2.models.checkpoint_names import FARM_NAME
from dinov2.models.downloads import cache_dir, fetch

logger = logging.getLogger("dinov2")

API_TIMEOUT_SECONDS = 10.0
API_BYTES = 1 << 24


def fetch_from_zenodo(name: str, *, sha256: str | None = None) -> Path:
    """Return a file of a record, downloading it the first time.

    The record's own checksum is compared where the server gives it.

    Args:
        name: ``<record>/<file>``, where the record is the number in its address.
        sha256: Expected checksum.

    Raises:
        DownloadError: The file could not be fetched.
        WeightsError: The name has another form, the record has no such file, or a checksum differs.
    """
    parts = re.fullmatch(r"(\d+)/([^/\\]+)", name)
    if parts is None or parts[2] in (".", ".."):
        raise WeightsError(
            f'"zenodo:{name}" does not name a file: expected is zenodo:<record>/<file>, with the number of '
            "the record as in its address, https://zenodo.org/records/<record>."
        )
    record, file = parts.groups()
    base = (os.environ.get("DINOV2_ZENODO_URL") or "https://zenodo.org").rstrip("/")
    target = cache_dir() / "zenodo" / record / file
    md5 = None if target.is_file() else _checksum(f"{base}/api/records/{record}", record, file)
    url = f"{base}/records/{record}/files/{urllib.parse.quote(file)}?download=1"
    return fetch(url, sha256=sha256, md5=md5, target=target)


def farm_file(name: str) -> Path | None:
    """Return the file of the model farm with this name from the cache, or None if ``name`` is no such name.

    Raises:
        WeightsError: It is, but the file is not there, or there are several.
    """
    if not FARM_NAME.fullmatch(name):
        return None
    found = sorted(path for path in cache_dir().glob(f"zenodo*/**/{name}") if path.is_file())
    if len(found) == 1:
        return found[0]
    where = f"several times below {cache_dir()}" if found else f"neither here nor below {cache_dir()}"
    raise WeightsError(
        f'"{name}" is a name of the model farm, but the file is {where}: give its path, or '
        f"zenodo:<record>/{name} with the number of its Zenodo record."
    )


def _checksum(address: str, record: str, file: str) -> str | None:
    """Return the MD5 that the record states for a file, or None if it cannot be had."""
    try:
        with urllib.request.urlopen(address, timeout=API_TIMEOUT_SECONDS) as response:
            content = json.loads(response.read(API_BYTES))
        listed = content["files"]
        checksums = {item["key"]: str(item.get("checksum", "")) for item in listed}
    except urllib.error.HTTPError as error:
        if error.code in (404, 410):
            raise WeightsError(
                f"Zenodo has no record {record} (the server answers {error.code}): take the number from the "
                "address of the record, https://zenodo.org/records/<record>."
            ) from error
        return _without(file, error)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return _without(file, error)
    if file not in checksums:
        raise WeightsError(
            f'The Zenodo record {record} has no file "{file}"{nearest(file, checksums)}: it has '
            f"{some_of(sorted(checksums), 10) or 'none'}."
        )
    algorithm, _, digits = checksums[file].partition(":")
    return digits if algorithm == "md5" and digits else _without(file, f"it states {checksums[file]!r}")


def _without(file: str, reason: Exception | str) -> None:
    logger.info("no checksum of %s is known from its Zenodo record (%s)", file, reason)
