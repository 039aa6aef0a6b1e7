"""Downloads against a server on this machine."""

import hashlib
import logging
import multiprocessing
import shutil
import threading
import types
from pathlib import Path

import pytest

from dinov2.errors import WeightsError
from dinov2.models import transfer
from dinov2.models.downloads import DownloadError, cache_path, fetch
from dinov2.models.integrity import sha256_of
from tests.models.servers import Served, Server, running

CONTENT = bytes(range(256)) * 20_000  # more than one block
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A running server with two files, one of which promises more than it sends."""
    monkeypatch.setenv("DINOV2_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(transfer, "PAUSE_SECONDS", 0.0)
    with running(Server()) as server:
        server.files["/weights.pth"] = Served(CONTENT)
        server.files["/cut.pth"] = Served(CONTENT, tag=None, length=str(len(CONTENT) + 1))
        yield server


def leftovers(tmp_path) -> list[Path]:
    return [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_a_file_is_downloaded_once(server, tmp_path):
    url = f"{server.url}/weights.pth"
    first = fetch(url, sha256=DIGEST)
    assert first == cache_path(url) and first.read_bytes() == CONTENT and sha256_of(first) == DIGEST
    assert fetch(url) == first
    assert server.sent == ["/weights.pth"]
    assert leftovers(tmp_path) == [first]


@pytest.mark.parametrize("kind", [threading.Thread, multiprocessing.get_context("fork").Process])
def test_processes_that_ask_together_share_one_download(server, kind):
    server.files["/weights.pth"].pause = threading.Event()  # long enough for all of them to ask
    ranks = [kind(target=fetch, args=(f"{server.url}/weights.pth",)) for _ in range(4)]
    for rank in ranks:
        rank.start()
    ranks[-1].join(0.5)
    server.files["/weights.pth"].pause.set()
    for rank in ranks:
        rank.join()
    assert server.sent == ["/weights.pth"]
    assert cache_path(f"{server.url}/weights.pth").read_bytes() == CONTENT


def test_who_waits_for_another_process_says_so(server, caplog):
    caplog.set_level(logging.INFO, logger="dinov2")
    server.files["/weights.pth"].pause = threading.Event()
    first = threading.Thread(target=fetch, args=(f"{server.url}/weights.pth",))
    first.start()
    while not server.sent:
        first.join(0.01)
    second = threading.Thread(target=fetch, args=(f"{server.url}/weights.pth",))
    second.start()
    while "waiting for another process" not in caplog.text:
        second.join(0.01)
    server.files["/weights.pth"].pause.set()
    first.join()
    second.join()
    assert server.sent == ["/weights.pth"]


def test_an_interrupted_download_goes_on_in_the_next_process(server, tmp_path):
    url = f"{server.url}/weights.pth"
    server.files["/weights.pth"].cuts = [1_000_000] + [0] * transfer.ATTEMPTS
    with pytest.raises(DownloadError):
        fetch(url, sha256=DIGEST)
    assert sum(path.stat().st_size for path in leftovers(tmp_path) if path.suffix == ".part") == 1_000_000
    server.requests.clear()
    assert fetch(url, sha256=DIGEST).read_bytes() == CONTENT
    assert [headers["Range"] for _, headers in server.requests] == ["bytes=1000000-"]
    assert leftovers(tmp_path) == [cache_path(url)]


def test_without_file_locks_each_process_has_its_own_part(server, tmp_path, monkeypatch):
    def unsupported(*arguments):
        raise OSError("no locks on this disk")

    monkeypatch.setattr("fcntl.flock", unsupported)
    server.files["/weights.pth"].cuts = [1000] + [0] * transfer.ATTEMPTS
    with pytest.raises(DownloadError):
        fetch(f"{server.url}/weights.pth")
    assert str(multiprocessing.current_process().pid) in leftovers(tmp_path)[0].name
    assert fetch(f"{server.url}/weights.pth").read_bytes() == CONTENT


def test_a_cached_file_is_compared_with_the_checksum_too(server):
    path = fetch(f"{server.url}/weights.pth")
    with pytest.raises(WeightsError, match=f"{DIGEST} instead of the expected {'1' * 64}"):
        fetch(f"{server.url}/weights.pth", sha256="1" * 64)
    assert path.exists()


def test_a_place_and_another_checksum_may_be_given(server, tmp_path):
    target = tmp_path / "cache" / "here" / "a.pth"
    md5 = hashlib.md5(CONTENT, usedforsecurity=False).hexdigest()
    with pytest.raises(WeightsError, match=f"md5 {md5} instead of the expected {'0' * 32}"):
        fetch(f"{server.url}/weights.pth", md5="0" * 32, target=target)
    assert leftovers(tmp_path) == []
    assert fetch(f"{server.url}/weights.pth", md5=md5, target=target) == target


def test_a_full_disk_is_not_blamed_on_the_network(server, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
    with pytest.raises(WeightsError, match="DINOV2_CACHE") as caught:
        fetch(f"{server.url}/weights.pth")
    assert not isinstance(caught.value, DownloadError) and "do not fit on the disk" in str(caught.value)


def test_a_login_page_does_not_enter_the_cache(server, tmp_path):
    server.files["/weights.pth"] = Served(b"<!doctype html><p>Please sign in</p>")
    with pytest.raises(DownloadError, match="web page"):
        fetch(f"{server.url}/weights.pth")
    assert leftovers(tmp_path) == []


def test_a_wrong_checksum_names_both_and_keeps_nothing(server, tmp_path):
    with pytest.raises(WeightsError) as caught:
        fetch(f"{server.url}/weights.pth", sha256="0" * 64)
    assert not isinstance(caught.value, DownloadError)
    message = str(caught.value)
    assert "0" * 64 in message and DIGEST in message and "download or copy the file again" in message
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(("file", "reason"), [("cut.pth", "IncompleteRead"), ("none.pth", "404")])
def test_what_does_not_arrive_leaves_nothing_behind(server, tmp_path, file, reason):
    with pytest.raises(DownloadError) as caught:
        fetch(f"{server.url}/{file}")
    message = str(caught.value)
    assert reason in message and str(cache_path(f"{server.url}/{file}")) in message and "\n" not in message
    assert leftovers(tmp_path) == []


def test_without_a_network_the_message_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("DINOV2_CACHE", str(tmp_path))
    with pytest.raises(DownloadError, match="give the path of that copy instead"):
        fetch("http://127.0.0.1:1/weights.pth", timeout=1)


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("DINOV2_CACHE", str(tmp_path / "file"))
    with pytest.raises(WeightsError, match="DINOV2_CACHE"):
        fetch("http://127.0.0.1:1/weights.pth")


def test_cache_paths_stay_apart_and_inside(tmp_path, monkeypatch):
    monkeypatch.setenv("DINOV2_CACHE", str(tmp_path))
    urls = [
        "https://host/a/weights.pth",
        "https://host/b/weights.pth",
        "https://other/a/weights.pth",
        "https://host/a/weights.pth?version=2",
        "https://host/../../weights.pth",
    ]
    paths = {cache_path(url) for url in urls}
    assert len(paths) == len(urls)
    assert all(path.resolve().is_relative_to(tmp_path) for path in paths)


@pytest.mark.parametrize(
    "url",
    [
        "https://host/",
        "https:///a.pth",
        "http://../a/b.pth",
        "http://./a/b.pth",
        "http://user@../b.pth",
        "http://host/a%00b.pth",
    ],
)
def test_addresses_that_lead_to_no_file_of_the_cache_are_refused(url):
    with pytest.raises(WeightsError, match="does not name a file"):
        cache_path(url)


def test_a_name_too_long_for_the_disk_gets_a_sentence(server):
    fetch(f"{server.url}/weights.pth")
    with pytest.raises(WeightsError, match="Cannot write weights to the cache"):
        fetch(f"{server.url}/{'x' * 300}.pth")
