"""Interrupted, cheated and slow transfers, against a server on this machine."""

import http.client
import logging
import threading
import urllib.error

import pytest

from dinov2.models import transfer as module
from dinov2.models.transfer import ATTEMPTS, transfer
from tests.models.servers import Served, Server, running

CONTENT = bytes(range(256)) * 5_000  # more than one block
OTHER = bytes(reversed(range(256))) * 5_000


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(module, "PAUSE_SECONDS", 0.0)
    with running(Server()) as server:
        yield server


@pytest.fixture
def partial(tmp_path):
    return tmp_path / "a.pth.part"


def asked_ranges(server):
    return [headers.get("Range") for _, headers in server.requests]


def get(server, partial, timeout=5.0):
    transfer(f"{server.url}/a.pth", partial, timeout)
    return partial.read_bytes()


@pytest.mark.parametrize("marks", [{"tag": '"one"'}, {"tag": None, "date": "Mon, 01 Jan 2024 00:00:00 GMT"}])
def test_a_dropped_connection_is_continued_where_it_stopped(server, partial, marks):
    server.files["/a.pth"] = Served(CONTENT, cuts=[1000, 700_000], **marks)
    assert get(server, partial) == CONTENT
    assert asked_ranges(server) == [None, "bytes=1000-", "bytes=701000-"]
    conditions = [headers.get("If-Range") for _, headers in server.requests]
    assert conditions == [None, *[marks["tag"] or marks["date"]] * 2]


def test_many_drops_are_endured_as_long_as_bytes_arrive(server, partial):
    server.files["/a.pth"] = Served(CONTENT, cuts=[50_000] * (3 * ATTEMPTS))
    assert get(server, partial) == CONTENT
    assert len(server.requests) == 3 * ATTEMPTS + 1


def test_a_later_call_continues_what_an_earlier_one_left(server, partial):
    server.files["/a.pth"] = Served(CONTENT, cuts=[1000] + [0] * ATTEMPTS)
    with pytest.raises(http.client.IncompleteRead):
        get(server, partial)
    assert partial.read_bytes() == CONTENT[:1000]
    server.requests.clear()
    assert get(server, partial) == CONTENT
    assert asked_ranges(server) == ["bytes=1000-"]


def test_a_server_that_serves_no_parts_starts_afresh(server, partial):
    server.files["/a.pth"] = Served(CONTENT, cuts=[1000], ranges=False)
    assert get(server, partial) == CONTENT
    assert asked_ranges(server) == [None, "bytes=1000-"]


def interrupted(server, partial, **options):
    """The first 1000 bytes of CONTENT are there; then the server holds OTHER."""
    server.files["/a.pth"] = Served(CONTENT, cuts=[1000] + [0] * ATTEMPTS)
    with pytest.raises(http.client.IncompleteRead):
        get(server, partial)
    server.requests.clear()
    server.files["/a.pth"] = Served(**{"content": OTHER, "tag": '"two"', **options})


@pytest.mark.parametrize("conditional", [True, False])
def test_a_file_that_changed_meanwhile_is_not_mixed_with_the_old_one(server, partial, conditional):
    interrupted(server, partial, conditional=conditional)
    assert get(server, partial) == OTHER


def test_a_part_longer_than_the_file_is_dropped(server, partial):
    interrupted(server, partial, content=OTHER[:900], tag='"one"')
    assert get(server, partial) == OTHER[:900]


def test_a_part_without_its_mark_or_of_another_address_is_not_continued(server, partial):
    interrupted(server, partial, content=CONTENT, tag='"one"')
    server.files["/b.pth"] = server.files["/a.pth"]
    transfer(f"{server.url}/b.pth", partial, 5.0)
    assert partial.read_bytes() == CONTENT
    partial.with_name(f"{partial.name}.json").write_text("{ damaged")
    assert get(server, partial) == CONTENT
    assert asked_ranges(server) == [None, None]


@pytest.mark.parametrize("tag", [None, 'W/"weak"'])
def test_without_a_dependable_mark_nothing_is_kept_or_continued(server, partial, tag):
    server.files["/a.pth"] = Served(CONTENT, tag=tag, cuts=[1000] * ATTEMPTS + [1000])
    with pytest.raises(http.client.IncompleteRead):
        get(server, partial)
    assert set(asked_ranges(server)) == {None}
    assert list(partial.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("status", "requests"), [(403, 1), (404, 1), (410, 1), (500, ATTEMPTS), (429, ATTEMPTS)]
)
def test_refusals_are_final_and_overload_may_pass(server, partial, status, requests):
    server.files["/a.pth"] = Served(CONTENT, status=[status] * 10)
    with pytest.raises(urllib.error.HTTPError, match=str(status)):
        get(server, partial)
    assert len(server.requests) == requests and list(partial.parent.iterdir()) == []


def test_a_server_that_recovers_is_used(server, partial):
    server.files["/a.pth"] = Served(CONTENT, status=[503, 500])
    assert get(server, partial) == CONTENT


def test_a_length_that_is_too_large_is_an_interruption(server, partial):
    server.files["/a.pth"] = Served(CONTENT, length=str(len(CONTENT) + 5), ranges=False)
    with pytest.raises(http.client.IncompleteRead):
        get(server, partial)


def test_a_length_that_no_disk_has_is_refused_before_the_first_byte(server, partial):
    server.files["/a.pth"] = Served(CONTENT, length=str(10**18))
    with pytest.raises(OSError, match="do not fit on the disk"):
        get(server, partial)
    assert list(partial.parent.iterdir()) == []


def test_a_file_of_unknown_length_is_read_to_its_end(server, partial):
    server.files["/a.pth"] = Served(CONTENT, length="")
    assert get(server, partial) == CONTENT


def test_a_web_page_is_no_file(server, partial):
    server.files["/a.pth"] = Served(b"\n<!DOCTYPE HTML><title>Sign in</title>")
    with pytest.raises(ValueError, match="web page"):
        get(server, partial)
    assert list(partial.parent.iterdir()) == []


def test_a_server_that_stalls_is_asked_again(server, partial):
    pause = threading.Event()
    server.files["/a.pth"] = Served(CONTENT, pause=pause)

    def resume_after_the_first_request():
        while len(server.requests) < 2:
            pause.wait(0.01)
        pause.set()

    threading.Thread(target=resume_after_the_first_request, daemon=True).start()
    assert get(server, partial, timeout=0.5) == CONTENT
    assert asked_ranges(server)[1] == f"bytes={len(CONTENT) // 2}-"


def test_without_a_connection_there_is_one_attempt(partial, monkeypatch):
    monkeypatch.setattr(module.time, "sleep", lambda seconds: pytest.fail("waited"))
    with pytest.raises(urllib.error.URLError):
        transfer("http://127.0.0.1:1/a.pth", partial, 1.0)


def test_the_pause_before_the_next_attempt_is_announced(server, partial, monkeypatch, caplog):
    pauses = []
    monkeypatch.setattr(module, "PAUSE_SECONDS", 1.0)
    monkeypatch.setattr(module.time, "sleep", pauses.append)
    server.files["/a.pth"] = Served(CONTENT, status=[503] * (ATTEMPTS - 1))
    with caplog.at_level(logging.INFO, logger="dinov2"):
        get(server, partial)
    assert pauses == [1.0, 2.0, 4.0]
    assert "503" in caplog.text and "next attempt in 4 s" in caplog.text
