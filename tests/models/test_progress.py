"""What a download says of its progress, on a terminal and in a log."""

import io
import logging
import re
import sys

import pytest

from dinov2.models import progress as module
from dinov2.models.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO, logger="dinov2")
    return caplog


def advance(done, total, steps, size):
    with Progress("a.pth", done, total) as progress:
        for _ in range(steps):
            progress.advance(size)


def test_in_a_log_every_tenth_gets_a_line(log, monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    advance(0, 1000, 500, 2)
    shares = [re.search(r"a\.pth: (\d+)% of", message)[1] for message in log.messages]
    assert shares == [str(share) for share in range(10, 101, 10)]
    assert stream.getvalue() == ""


def test_a_continued_download_counts_from_where_it_was(log):
    advance(450, 1000, 55, 10)
    assert log.messages[0].startswith("a.pth: 50%") and len(log.messages) == 6


def test_without_a_known_size_every_hundred_megabytes_get_a_line(log):
    advance(0, None, 25, 10_000_000)
    assert [message.split(",")[0] for message in log.messages] == ["a.pth: 100.0 MB", "a.pth: 200.0 MB"]


def test_on_a_terminal_there_is_one_line_that_changes(log, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(module, "REDRAW_SECONDS", 0.0)
    advance(0, 1000, 10, 100)
    drawn = sys.stderr.getvalue()
    assert log.messages == []
    assert drawn.count("\r") == 11 and drawn.count("\n") == 1 and drawn.endswith("\n")
    assert "[###                           ]" in drawn and f"[{'#' * 30}] a.pth: 100%" in drawn


def test_without_a_standard_error_there_is_a_log(log, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    advance(0, 1000, 1, 1000)
    assert len(log.messages) == 1
