"""The command that builds the index of a tile tree."""

import re
import runpy
import subprocess
import sys

import numpy as np
import pytest

from dinov2.data import index
from dinov2.errors import ConfigError, DatasetError
from tests.conftest import REPO


def test_main(tile_tree):
    index.main(["--root", str(tile_tree), "--extra", str(tile_tree / "extra"), "--sshid", "13"])
    assert len(np.load(tile_tree / "extra" / "entries-TRAIN.npy")) == 8


def test_a_wrong_folder_ends_in_one_sentence_and_status_1(tile_tree, monkeypatch, capsys):
    arguments = ["--root", str(tile_tree / "none"), "--extra", str(tile_tree)]
    monkeypatch.setattr(sys, "argv", ["index", *arguments])
    monkeypatch.delitem(sys.modules, "dinov2.data.index")
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("dinov2.data.index", run_name="__main__")
    assert stop.value.code == 1
    assert capsys.readouterr().err == (
        f'error: the root of Pathology is "{tile_tree}/none", which is no folder: give the path of one\n'
    )


def test_patches_writes_an_entry_csv_and_never_replaces_one(tile_tree, capsys):
    (tile_tree / "entry.csv").unlink()
    tree = tile_tree / 'patches, "these"'
    (tile_tree / "patches").rename(tree)
    options = ["--patches", str(tree), "--extra", str(tile_tree / "extra"), "--verify", "decode"]
    index.main(options)
    assert "8 tiles of 3 slides" in capsys.readouterr().out
    before = (tile_tree / "extra" / "entry.csv").read_bytes()
    index.main([*options, "--workers", "0", "--fresh"])
    assert (tile_tree / "extra" / "entry.csv").read_bytes() == before
    with pytest.raises(ConfigError, match="leave --patches out"):
        index.main(["--patches", str(tile_tree), "--extra", str(tile_tree / "extra")])
    assert (tile_tree / "extra" / "entry.csv").read_bytes() == before
    with pytest.raises(DatasetError, match="--patches of the index builder is .* no folder"):
        index.main(["--patches", str(tile_tree / "none"), "--extra", str(tile_tree / "other")])


def test_the_whole_output(tile_tree):
    """On a terminal log and result stand below each other: nothing is said twice."""
    (tile_tree / "patches" / "slide_a" / "Thumbs.db").touch()
    command = [sys.executable, str(REPO / "scripts" / "build_index.py"), "--extra", str(tile_tree)]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240, check=True
    )
    skipped, result = done.stdout.splitlines()
    assert skipped == (
        "left out, as 1 file is no tile (1: the name is not <slide>_patch_<number>(.jpeg|.jpg|.png)); "
        f'see "{tile_tree}/skipped-TRAIN.csv"'
    )
    expected = r": 8 tiles of 3 slides in [\d.]+ s \(3 slides listed, 0 unchanged; 1 file left out\)"
    assert re.fullmatch(re.escape(str(tile_tree)) + expected, result)


def test_path_map_on_the_command_line(tile_tree):
    (tile_tree / "entry.csv").write_text("patches_path\n/recorded/here\n")
    arguments = ["--root", str(tile_tree), "--extra", str(tile_tree / "extra")]
    index.main([*arguments, "--path-map", f"/recorded/here={tile_tree / 'patches'}"])
    assert len(np.load(tile_tree / "extra" / "entries-TRAIN.npy")) == 8
