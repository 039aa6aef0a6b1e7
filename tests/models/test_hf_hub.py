"""The Hugging Face Hub's own library against a server on this machine that speaks its few addresses.

The library reads its endpoint when it is imported. So it runs in processes of their own, which are forked off
one that has imported everything else.
"""

import hashlib
import json
import os
import re
import select
import subprocess
import sys
import urllib.parse
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from dinov2.errors import WeightsError
from dinov2.models import hf_hub
from dinov2.models.hf_hub import HubName, fetch_from_hub
from dinov2.models.shards import INDEX_SUFFIX
from dinov2.models.weight_files import open_file
from tests.conftest import REPO
from tests.models.servers import Served, Server, running

pytest.importorskip("huggingface_hub")

COMMIT = "c0ffee" + "0" * 34
OLDER = "bead" + "1" * 36
WEIGHTS = save({"cls_token": torch.ones(3)})
SHARDS = {
    "model-1.safetensors": save({"a": torch.ones(2)}),
    "model-2.safetensors": save({"b": torch.zeros(2)}),
}
INDEX = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}).encode()
CONFIG = b'{"architecture": "vit_large_patch16_224"}'
PREPROCESSING = b'{"image_mean": [0.7, 0.6, 0.7], "image_std": [0.2, 0.2, 0.2]}'

REPOSITORIES = {
    "lab/single": {
        "model.safetensors": WEIGHTS,
        "pytorch_model.bin": b"x",
        "config.json": CONFIG,
        "preprocessor_config.json": PREPROCESSING,
        "README.md": b"x",
    },
    "lab/sharded": {"model.safetensors.index.json": INDEX, **SHARDS, "config.json": CONFIG},
    "lab/partial": {
        "model.safetensors.index.json": INDEX,
        "model-1.safetensors": SHARDS["model-1.safetensors"],
    },
    "lab/only": {"weights/deep.safetensors": WEIGHTS, "uni.safetensors": WEIGHTS},
    "lab/several": {"a.pth": b"a", "b.pth": b"b"},
    "lab/gated": {"model.safetensors": WEIGHTS, "config.json": CONFIG},
    "lab/damaged": {"model.safetensors": WEIGHTS},
    "lab/later": {"model.safetensors": WEIGHTS},
    "lab/moving": {"model.safetensors.index.json": INDEX, **SHARDS, "config.json": CONFIG},
}


class Hub(Server):
    """Repositories with two versions; one is open to the holder of one token, one states a wrong checksum."""

    def find(self, handler):
        path = urllib.parse.unquote(handler.path.partition("?")[0])
        token = handler.headers.get("Authorization", "").removeprefix("Bearer ")
        listing = re.fullmatch(r"/api/models/(\w+/\w+)(?:/revision/(.+))?", path)
        file = re.fullmatch(r"/(\w+/\w+)/resolve/([^/]+)/(.+)", path)
        if not listing and not file:
            return None
        repo, revision = (listing or file).groups("main")[:2]
        if token == "expired":
            return refused(401, "", "Invalid credentials in Authorization header")
        if repo not in REPOSITORIES:
            return refused(404 if token else 401, "RepoNotFound")
        if repo == "lab/gated" and token != "granted" and file:
            return refused(403 if token else 401, "GatedRepo")
        if revision not in ("main", "older", COMMIT, OLDER):
            return refused(404, "RevisionNotFound")
        files = REPOSITORIES[repo]
        if listing:
            siblings = [{"rfilename": name} for name in files]
            return Served(json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode())
        if file[3] not in files:
            return refused(404, "EntryNotFound")
        digest = hashlib.sha256(files[file[3]]).hexdigest()
        tag = (
            "0" * 64 if repo == "lab/damaged" else digest if file[3].endswith(".safetensors") else digest[:40]
        )
        older = revision in ("older", OLDER)
        if repo == "lab/moving" and revision == "main":  # it moves on once the first file has been fetched
            older = file[3].endswith(INDEX_SUFFIX)
        if repo == "lab/later" and not older:  # where only the newer version is damaged
            tag = "0" * 64
        commit = OLDER if older else COMMIT
        return Served(files[file[3]], tag=f'"{tag}"', headers={"X-Repo-Commit": commit}, ranges=False)


def refused(status, code, message=""):
    return Served(b"", status=[status], headers={"X-Error-Code": code, "X-Error-Message": message})


CHILD = """
import json, multiprocessing, os, sys
from dinov2.errors import UserError
from dinov2.models.sources import locate

# Each fork imports the library anew, in an environment of its own; what it builds upon is there by then.
import huggingface_hub.file_download, huggingface_hub.hf_api
for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
    del sys.modules[name]

def outcome(request):
    source, token = request
    os.environ.pop("HF_TOKEN", None)
    if token:
        os.environ["HF_TOKEN"] = token
    try:
        return str(locate(source))
    except UserError as error:
        return f"{type(error).__name__}: {error}"

def answer(job):
    os.environ.update(job["environment"])
    requests = job["requests"]
    if job["together"]:  # one process for each, as the ranks of a training are
        import huggingface_hub.file_download
        with multiprocessing.get_context("fork").Pool(len(requests)) as pool:
            outcomes = pool.map(outcome, requests, chunksize=1)
    else:
        outcomes = [outcome(request) for request in requests]
    print(json.dumps(outcomes), flush=True)

for line in sys.stdin:
    fork = multiprocessing.get_context("fork").Process(target=answer, args=(json.loads(line),))
    fork.start()
    fork.join()
    if fork.exitcode:
        print(json.dumps([f"the process ended with {fork.exitcode}"]), flush=True)
"""
SECONDS = 180
NOWHERE = "http://127.0.0.1:1"


@pytest.fixture(scope="module")
def child():
    """A process that answers one line of JSON with another."""
    cleared = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD],
        env={**cleared, "PYTHONPATH": str(REPO)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    yield process
    process.communicate(timeout=SECONDS)


@pytest.fixture(scope="module")
def hub(child):
    with running(Hub()) as server:
        server.child = child
        yield server


@pytest.fixture
def home(tmp_path):
    return tmp_path / "hf"


def ask(hub, home, *requests, together=False, **environment) -> list[str]:
    """Locate sources, alone or with a token, in a process with these variables; return what comes of it."""
    job = {
        "requests": [request if isinstance(request, tuple) else (request, None) for request in requests],
        "environment": {"HF_HOME": str(home), "HF_ENDPOINT": hub.url, **environment},
        "together": together,
    }
    print(json.dumps(job), file=hub.child.stdin, flush=True)
    assert select.select([hub.child.stdout], [], [], SECONDS)[0], "no answer"
    found = json.loads(hub.child.stdout.readline())
    assert len(found) == len(requests), found
    assert not any("\n" in outcome for outcome in found)
    return found


def test_repositories_are_fetched_and_the_cache_serves_offline(hub, home):
    sources = [
        "hf-hub:lab/single",
        "hf_hub:lab/sharded",
        "hf-hub:lab/only",
        "hf-hub:lab/only:weights/deep.safetensors",
        "hf-hub:lab/single@older:pytorch_model.bin",
    ]
    found = ask(hub, home, *sources, ("hf-hub:lab/gated", "granted"))
    names = ["model.safetensors", "model.safetensors.index.json", "uni.safetensors", "deep.safetensors"]
    assert [Path(path).name for path in found] == [*names, "pytorch_model.bin", "model.safetensors"]
    single, sharded, *_, older, gated = found
    assert OLDER in older and COMMIT in single
    assert torch.equal(open_file(Path(single)).content["cls_token"].read(), torch.ones(3))
    assert open_file(Path(sharded)).content.keys() == {"a", "b"}
    digest = hashlib.sha256(WEIGHTS).hexdigest()
    assert ask(hub, home, f"hf-hub:lab/single#sha256={digest}") == [single]
    for path in (single, sharded, gated):
        assert Path(path).with_name("config.json").read_bytes() == CONFIG
    assert Path(single).with_name("preprocessor_config.json").read_bytes() == PREPROCESSING
    # Without a network, with and without the library knowing of it, and after access was withdrawn:
    again = [*sources, "hf-hub:lab/gated"]
    assert ask(hub, home, *again, HF_HUB_OFFLINE="1") == found
    assert ask(hub, home, *again, HF_ENDPOINT=NOWHERE) == found
    assert ask(hub, home, "hf-hub:lab/gated") == [gated]


def test_what_cannot_be_had_gets_one_sentence(hub, home):
    digest, wrong = hashlib.sha256(WEIGHTS).hexdigest(), "1" * 64
    cases = {
        ("hf-hub:lab/gated", None): [
            "no token is set",
            "request access at https://huggingface.co/lab/gated",
            "HF_TOKEN",
        ],
        ("hf-hub:lab/gated", "other"): [
            "has no access",
            "request access at https://huggingface.co/lab/gated",
        ],
        ("hf-hub:lab/none", None): ["no repository lab/none", "no token is set in HF_TOKEN"],
        ("hf-hub:lab/none", "other"): ["no repository lab/none", "the token that is set has no access"],
        ("hf-hub:lab/single", "expired"): ["refuses the token"],
        ("hf-hub:lab/single@v9", None): ['no revision "v9"'],
        ("hf-hub:lab/single:model.safetensor", None): ['did you mean "model.safetensors"?'],
        ("hf-hub:lab/several", None): ["a.pth, b.pth: name the file"],
        ("hf-hub:lab/partial", None): ["lacks model-2.safetensors"],
        ("hf-hub:lab/damaged", None): [f"sha256 {digest} instead of the expected {'0' * 64}"],
        ("hf-hub:lab/damaged", "again"): [f"sha256 {digest} instead of the expected {'0' * 64}"],
        (f"hf-hub:lab/single#sha256={wrong}", None): [f"sha256 {digest} instead of the expected {wrong}"],
        ("hf-hub:single", None): ["hf-hub:owner/name[@revision]"],
    }
    for case, message in zip(cases, ask(hub, home, *cases), strict=True):
        assert message.startswith("WeightsError: "), case
        assert all(words in message for words in cases[case]), (case, message)


def test_without_network_and_copy_the_message_says_what_would_do(hub, home):
    offline = ask(hub, home, "hf-hub:lab/single", HF_HUB_OFFLINE="1")
    unreachable = ask(hub, home, "hf-hub:lab/single", HF_ENDPOINT=NOWHERE)
    assert "HF_HUB_OFFLINE is set" in offline[0]
    for (message,) in (offline, unreachable):
        assert message.startswith("DownloadError: Cannot get hf-hub:lab/single")
        assert str(home) in message and "path of a folder with model.safetensors" in message


def test_an_incomplete_copy_does_not_serve(hub, home):
    (index,) = ask(hub, home, "hf-hub:lab/sharded")
    Path(index).with_name("model-2.safetensors").unlink()
    (message,) = ask(hub, home, "hf-hub:lab/sharded", HF_HUB_OFFLINE="1")
    assert "has no complete copy" in message
    assert ask(hub, home, "hf-hub:lab/sharded") == [index]  # completed again


def test_processes_that_ask_together_share_one_download(hub, home):
    hub.sent.clear()
    found = ask(hub, home, *["hf-hub:lab/single"] * 3, together=True)
    assert len(found) == 3 and len(set(found)) == 1 and Path(found[0]).read_bytes() == WEIGHTS
    assert hub.sent.count("/lab/single/resolve/main/model.safetensors") == 1


def test_a_newer_version_is_compared_with_its_checksum_too(hub, home):
    digest = hashlib.sha256(WEIGHTS).hexdigest()
    requests = ["hf-hub:lab/later@older", "hf-hub:lab/later"]
    older, message = ask(hub, home, *requests)
    refs = home / "hub" / "models--lab--later" / "refs"
    assert OLDER in older and f"sha256 {digest} instead of the expected {'0' * 64}" in message
    (refs / "main").write_text(OLDER)  # as if main had been fetched when it was the older version
    assert ask(hub, home, "hf-hub:lab/later", HF_HUB_OFFLINE="1") == [older]
    assert f"instead of the expected {'0' * 64}" in ask(hub, home, "hf-hub:lab/later")[0]


def test_all_files_are_of_one_version_though_the_repository_moves(hub, home):
    (index,) = ask(hub, home, "hf-hub:lab/moving")
    assert OLDER in index
    names = {path.name for path in Path(index).parent.iterdir()}
    assert names == set(REPOSITORIES["lab/moving"])
    assert ask(hub, home, "hf-hub:lab/moving", HF_HUB_OFFLINE="1") == [index]


def test_names_are_taken_apart():
    assert HubName.parse("MahmoodLab/UNI2-h") == HubName("MahmoodLab/UNI2-h")
    assert HubName.parse("a/b@refs/pr/1:c/d.bin") == HubName("a/b", "refs/pr/1", "c/d.bin")
    assert str(HubName("a/b", "v1", "c.bin")) == "hf-hub:a/b@v1:c.bin"


@pytest.mark.parametrize(
    "text", ["", "a", "a/b/c", "a/b@", "a/b:", "a/b:../c", "../b", "a/b@/etc", "a/b:/c", "a b/c"]
)
def test_other_names_are_refused(text):
    with pytest.raises(WeightsError, match="owner/name"):
        HubName.parse(text)


def test_without_the_library_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(WeightsError, match="pip install huggingface_hub"):
        fetch_from_hub("a/b")


def test_progress_bars_are_for_terminals(monkeypatch):
    from huggingface_hub.utils import are_progress_bars_disabled

    before = are_progress_bars_disabled()
    for terminal in (True, False):
        monkeypatch.setattr(hf_hub.sys.stderr, "isatty", lambda value=terminal: value, raising=False)
        with hf_hub._progress_on_terminals_only():
            assert are_progress_bars_disabled() == (before or not terminal)
        assert are_progress_bars_disabled() == before
