"""The benchmark of the neighbour search: every search finds the same, and other checkouts take part."""

import json
import os

import pytest

from dinov2.errors import ConfigError, OutputError
from scripts import bench_eval
from scripts.bench_eval import get_args_parser, main
from scripts.speed.checkouts import SideError
from tests.conftest import REPO

SIZES = ["--stored", "500", "--queries", "40", "--width", "16", "--k", "5", "--rounds", "1"]


def run(tmp_path, *options):
    report = tmp_path / "report.json"
    main(get_args_parser().parse_args([*SIZES, "--output", str(report), *options]))
    return json.loads(report.read_text())


def test_searches_find_the_same(tmp_path, capsys):
    report = run(tmp_path)
    assert report["options"]["stored"] == 500
    assert report["scikit-learn"]["agrees_with_here"] > 0.99
    assert report["here"]["peak_mib_above_features"] >= 0
    assert "| scikit-learn |" in capsys.readouterr().out


def test_another_checkout_votes_in_turn_with_this_one(tmp_path, capsys):
    report = run(tmp_path, "--against", str(REPO), "--threads", "1")
    assert report["the other checkout"]["agrees_with_here"] == 1.0
    assert "| the other checkout |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--k", "501"], "--k is 501; use at most --stored, which is 500"),
        (["--rounds", "0"], "--rounds is 0; use 1 or more"),
        (["--threads", "-1"], "--threads is -1; use 0 or more"),
        (["--against", "/nowhere"], "holds no dinov2/eval: name a checkout's folder"),
    ],
)
def test_mistakes(options, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, *options)


def test_a_file_that_can_not_be_written_is_found_before_anything_is_timed(tmp_path, capsys):
    with pytest.raises(OutputError, match="can not be written .No such file or directory.: name a file"):
        run(tmp_path, "--output", str(tmp_path / "nowhere" / "report.json"))
    assert not capsys.readouterr().out


def test_a_search_that_dies_is_named(tmp_path, monkeypatch):
    """As one does that the system ends for its memory."""
    monkeypatch.setattr(bench_eval, "measure", os._exit)
    with pytest.raises(SideError, match="the search of here ended without a result .exit code"):
        run(tmp_path)
