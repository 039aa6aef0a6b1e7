"""Downloads against a server on this machine."""

import functools
import hashlib
import http.server
import threading
from pathlib import Path

import pytest

from dinov2.errors import WeightsError
from dinov2.models.downloads import DownloadError, cache_path, fetch
from dinov2.models.integrity import sha256_of

CONTENT = bytes(range(256)) * 20_000  # more than one block


class Handler(http.server.SimpleHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append(self.path)
        if self.path.endswith("cut.pth"):  # promises more than it sends
            self.send_response(200)
            self.send_header("Content-Length", str(len(CONTENT) + 1))
            self.end_headers()
            self.wfile.write(CONTENT)
        else:
            super().do_GET()

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A running server with one file; ``server.requests`` is what it was asked for."""
    monkeypatch.setenv("DINOV2_CACHE", str(tmp_path / "cache"))
    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "weights.pth").write_bytes(CONTENT)
    handler = functools.partial(Handler, directory=str(tmp_path / "www"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        running.requests = []
        running.url = f"http://127.0.0.1:{running.server_port}"
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


def leftovers(tmp_path) -> list[Path]:
    return [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_a_file_is_downloaded_once(server, tmp_path):
    url = f"{server.url}/weights.pth"
    checksum = hashlib.sha256(CONTENT).hexdigest()
    first = fetch(url, sha256=checksum)
    assert first == cache_path(url) and first.read_bytes() == CONTENT and sha256_of(first) == checksum
    assert fetch(url) == first
    assert server.requests == ["/weights.pth"]
    assert leftovers(tmp_path) == [first]


def test_processes_that_ask_together_share_one_download(server):
    url = f"{server.url}/weights.pth"
    threads = [threading.Thread(target=fetch, args=(url,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(server.requests) == 1


def test_a_wrong_checksum_names_both_and_keeps_nothing(server, tmp_path):
    with pytest.raises(WeightsError) as caught:
        fetch(f"{server.url}/weights.pth", sha256="0" * 64)
    assert not isinstance(caught.value, DownloadError)
    message = str(caught.value)
    assert "0" * 64 in message and hashlib.sha256(CONTENT).hexdigest() in message and "explicitly" in message
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
    with pytest.raises(WeightsError, match="does not name a file"):
        cache_path("https://host/")
