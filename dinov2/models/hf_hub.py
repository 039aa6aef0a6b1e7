"""Weights from the Hugging Face Hub, through its own library and cache."""

import contextlib
import logging
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

from dinov2.errors import WeightsError, nearest
from dinov2.models.downloads import DownloadError
from dinov2.models.folders import choose_file, no_choice, weight_files
from dinov2.models.integrity import check_digest
from dinov2.models.shards import INDEX_SUFFIX, read_index, read_table

logger = logging.getLogger("dinov2")

HUB = "https://huggingface.co"
NAME = re.compile(
    r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[^:@/][^:@]*))?(:(?P<file>[^:/][^:]*))?", re.ASCII
)
CONFIG = "config.json"
COMPANIONS = (CONFIG, "preprocessor_config.json")
TIMEOUT_SECONDS = 10.0


@dataclass(frozen=True)
class HubName:
    """A repository of the Hub, a version of it or None for the newest, and a file of it or None."""

    repo: str
    revision: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"hf-hub:{self.repo}{revision}" + (f":{self.file}" if self.file else "")

    @classmethod
    def parse(cls, text: str) -> "HubName":
        """Read ``owner/name[@revision][:file/in/repository]``, or raise :class:`WeightsError`."""
        parts = NAME.fullmatch(text)
        if parts is None or ".." in re.split("[/:@]", text):
            raise WeightsError(
                f'"hf-hub:{text}" does not name a repository: expected is '
                "hf-hub:owner/name[@revision][:file/in/repository], such as hf-hub:MahmoodLab/uni."
            )
        return cls(parts["repo"], parts["revision"], parts["file"])


def fetch_from_hub(text: str, *, entry: str = "teacher") -> Path:
    """Return the weight file, or the index, of a repository; shards and configs lie beside it.

    A complete copy in the library's cache serves when the Hub cannot be reached or refuses.

    Args:
        text: ``owner/name[@revision][:file/in/repository]``.
        entry: Which of a repository's exports is meant, if it has several.

    Raises:
        DownloadError: There is no network and no cached copy.
        WeightsError: The name is wrong, the library is missing, or the repository is gated or unknown.
    """
    name = HubName.parse(text)
    try:
        import huggingface_hub
    except ImportError as error:
        raise WeightsError(
            f"{name} needs the package huggingface_hub, which is not installed: run "
            '"pip install huggingface_hub", or give the path of a local copy.'
        ) from error
    try:
        info = huggingface_hub.HfApi().model_info(name.repo, revision=name.revision, timeout=TIMEOUT_SECONDS)
        listed = [sibling.rfilename for sibling in info.siblings or []]
    except (
        Exception
    ) as error:  # of several libraries, depending on the version; all of them end in a sentence
        cached = _cached(name, entry)
        if cached is None:
            _refuse(name, error)
        logger.info("the Hub did not answer for %s (%s): using the cached copy", name, type(error).__name__)
        return cached
    top = [file for file in listed if "/" not in file]
    file = name.file or choose_file(top if weight_files(top) else listed, entry)
    if file is None:
        raise WeightsError(no_choice(f"The repository {name}", listed, entry))
    if file not in listed:
        raise WeightsError(f'The repository {name.repo} has no file "{file}"{nearest(file, listed)}.')
    return _download(name, file, listed)


def _download(name: HubName, file: str, listed: list[str]) -> Path:
    """Fetch a file with all that belongs to it."""
    folder = file[: file.rfind("/") + 1]
    logger.info("%s: fetching %s from the Hugging Face Hub, unless it is cached", name, file)
    try:
        with _progress_on_terminals_only():
            path = _fetch_one(name, file)
            # The rest is of the same commit, whatever a branch means by then. The first file is asked for by
            # the name of the branch, as the cache notes down which commit that was.
            commit = path.parents[file.count("/")].name
            for shard in _shards(name, file, path, listed) if file.endswith(INDEX_SUFFIX) else ():
                _fetch_one(replace(name, revision=commit), shard)
            for companion in COMPANIONS:
                if folder + companion in listed:
                    _fetch_one(replace(name, revision=commit), folder + companion)
    except WeightsError:
        raise
    except Exception as error:
        _refuse(name, error)
    return path


def _fetch_one(name: HubName, file: str) -> Path:
    """Return a file from the library's cache; a fresh one is compared with the checksum the Hub states."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    known = try_to_load_from_cache(name.repo, file, revision=name.revision)  # perhaps of an older version
    path = Path(hf_hub_download(name.repo, file, revision=name.revision))
    if str(path) != known and path.is_symlink():  # to a file named by the checksum, if it is a large one
        stated = path.readlink().name
        if re.fullmatch(r"[0-9a-f]{64}", stated):
            try:
                check_digest(path, stated, str(name))
            except WeightsError:  # the next call must not take it for a good copy
                path.resolve().unlink()
                path.unlink()
                raise
    return path


def _shards(name: HubName, file: str, index: Path, listed: list[str]) -> list[str]:
    """Return the files that belong to an index, as the repository names them."""
    folder = file[: file.rfind("/") + 1]
    shards = sorted({folder + shard for shard in read_table(index)[0].values()})
    lost = [shard for shard in shards if shard not in listed]
    if lost:
        raise WeightsError(
            f"The repository {name.repo} lacks {', '.join(lost)}, which its index {file} names."
        )
    return shards


def _cached(name: HubName, entry: str) -> Path | None:
    """Return the weight file of a complete copy in the library's cache.

    The cache's layout is documented: a version's files lie in ``snapshots/<commit>``, ``refs`` names commits.
    """
    from huggingface_hub import constants

    store = Path(constants.HF_HUB_CACHE) / f"models--{name.repo.replace('/', '--')}"
    revision = name.revision or constants.DEFAULT_REVISION
    reference = store / "refs" / revision
    commit = reference.read_text().strip() if reference.is_file() else revision
    folder = store / "snapshots" / commit
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    file = name.file or choose_file(names, entry)
    if file is None or not (folder / file).is_file():
        return None
    if file.endswith(INDEX_SUFFIX):
        with contextlib.suppress(WeightsError):
            read_index(folder / file)
            return folder / file
        return None
    return folder / file


def _refuse(name: HubName, error: Exception) -> NoReturn:
    """Raise the sentence for what the Hub's library met."""
    from huggingface_hub import constants, errors, get_token

    page, has_token = f"{HUB}/{name.repo}", get_token() is not None
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        message = f"The repository {name.repo} is gated and " + (
            f"the token that is set has no access to it: request access at {page} with the account of that "
            "token, wait until it is granted, and let a fine-grained token read gated repositories."
            if has_token
            else f"no token is set: sign in and request access at {page}, then set HF_TOKEN to a token of "
            f"yours from {HUB}/settings/tokens."
        )
    elif isinstance(error, errors.RepositoryNotFoundError):
        message = (
            f"The Hub has no repository {name.repo}, or it is private and "
            f"{'the token that is set has no access to it' if has_token else 'no token is set in HF_TOKEN'}: "
            f"check its name at {page}."
        )
    elif isinstance(error, errors.RevisionNotFoundError):
        message = f'The repository {name.repo} has no revision "{name.revision}": see {page}/tree/main.'
    elif status == 401:
        message = (
            f"The Hub refuses the token that is set: make a new one at {HUB}/settings/tokens, or unset it."
        )
    else:
        _unreachable(name, error, constants.HF_HUB_CACHE)
    raise WeightsError(message) from error


def _unreachable(name: HubName, error: Exception, cache: str) -> NoReturn:
    offline = type(error).__name__ == "OfflineModeIsEnabled"
    reason = "HF_HUB_OFFLINE is set" if offline else str(error).strip().partition("\n")[0][:120]
    raise DownloadError(
        f"Cannot get {name} from the Hub ({reason or type(error).__name__}), and its cache {cache} has no "
        f'complete copy: run "hf download {name.repo}" on a machine with network access and copy the cache, '
        f"or give the path of a folder with model.safetensors and {CONFIG}."
    ) from error


@contextlib.contextmanager
def _progress_on_terminals_only() -> Iterator[None]:
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled() or (sys.stderr is not None and sys.stderr.isatty()):
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
