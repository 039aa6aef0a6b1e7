"""DINOv2's releases: names, addresses, and checksums where they are known."""

import itertools
from pathlib import Path

import torch

from dinov2.errors import WeightsError, nearest
from dinov2.models.downloads import cache_path, fetch
from dinov2.models.integrity import check_digest

_DINOV2_BASE_URL = "https://dl.fbaipublicfiles.com/dinov2"

ARCHITECTURES = ("vit_small", "vit_base", "vit_large", "vit_giant2")
PATCH_SIZE = 14
NUM_REGISTER_TOKENS = 4  # of the variants that have them
RELEASE_SHA256 = {"dinov2_vits14": "b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9"}


def _make_dinov2_model_name(arch_name: str, patch_size: int, num_register_tokens: int = 0) -> str:
    """Return the released name of an architecture, such as ``dinov2_vits14_reg4`` for ``vit_small``."""
    registers = f"_reg{num_register_tokens}" if num_register_tokens else ""
    size = arch_name.removeprefix("vit_")[0]
    return f"dinov2_vit{size}{patch_size}{registers}"


def release_url(arch_name: str, patch_size: int, num_register_tokens: int, suffix: str) -> str:
    """Return the address of a released file; the folder carries no register suffix, the file does."""
    folder = _make_dinov2_model_name(arch_name, patch_size)
    file = _make_dinov2_model_name(arch_name, patch_size, num_register_tokens)
    return f"{_DINOV2_BASE_URL}/{folder}/{file}_{suffix}.pth"


RELEASE_URLS = {
    _make_dinov2_model_name(arch, PATCH_SIZE, registers): release_url(arch, PATCH_SIZE, registers, "pretrain")
    for arch, registers in itertools.product(ARCHITECTURES, (0, NUM_REGISTER_TOKENS))
}


def release_name(name: str) -> str:
    """Return the released name that ``name`` spells, which may end in ``_reg`` as in :mod:`torch.hub`.

    Raises:
        WeightsError: There is no such release.
    """
    full = f"{name}{NUM_REGISTER_TOKENS}" if name.endswith("_reg") else name
    if full not in RELEASE_URLS:
        raise WeightsError(
            f'"{name}" is no release of DINOv2{nearest(full, RELEASE_URLS)}: accepted is '
            f"{', '.join(RELEASE_URLS)}."
        )
    return full


def cached_release(name: str, *, sha256: str | None = None) -> Path | None:
    """Return the file of a release if this project or :mod:`torch.hub` downloaded it before.

    Raises:
        WeightsError: There is no such release, or the file has another checksum.
    """
    name = release_name(name)
    url, expected = RELEASE_URLS[name], sha256 or RELEASE_SHA256.get(name)
    for path in (cache_path(url), Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]):
        if path.is_file():
            if expected:
                check_digest(path, expected, str(path))
            return path
    return None


def fetch_release(name: str, *, sha256: str | None = None, timeout: float = 10.0) -> Path:
    """Return the file of a release from a local cache or, if there is none, from DINOv2's server.

    Args:
        name: ``dinov2_vit{s,b,l,g}14``, with ``_reg`` or ``_reg4`` for the variant with register tokens.
        sha256: Expected checksum in place of the known one.
        timeout: See :func:`fetch`.

    Raises:
        DownloadError: The file could not be fetched.
        WeightsError: There is no such release, or the file has another checksum.
    """
    name = release_name(name)
    return cached_release(name, sha256=sha256) or fetch(
        RELEASE_URLS[name], sha256=sha256 or RELEASE_SHA256.get(name), timeout=timeout
    )
