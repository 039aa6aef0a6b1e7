"""The command that builds the index of a tile tree."""

import runpy
import sys

import numpy as np
import pytest

from dinov2.data import index


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
