"""Two processes come to one verdict, also when only one of them sees what is wrong."""

import json

import pytest
from omegaconf import OmegaConf

from tests.distributed.launch import run_script
from tests.train.conftest import TinyRun

pytestmark = pytest.mark.slow

FAULTS = ("none", "masks", "teacher", "forward", "tile")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tile_folder):
    """What two processes made of a run, by the fault that only the second one has."""
    folder = tmp_path_factory.mktemp("processes")
    # A part of a sharded teacher would be missed by all; whole ones can differ between the processes.
    whole = "compute_precision.teacher.backbone.sharding_strategy=NO_SHARD"
    options = ("train.centering=centering", "dino.koleo_scope=global", whole)
    cfg = TinyRun(folder, tile_folder).resolve(*options)
    OmegaConf.save(cfg, folder / "resolved.yaml")
    run_script("tests/train/self_check_worker.py", str(folder / "resolved.yaml"), str(folder), *FAULTS)
    return folder


def outcome_of(folder, fault):
    """What every process was told, which has to be the same."""
    first, second = (json.loads((folder / fault / f"outcome_{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    return first


def test_a_healthy_run_passes_on_both(folder):
    outcome = outcome_of(folder, "none")
    assert outcome["error"] == ""
    lines = {name: (status, text) for name, status, text in outcome["lines"]}
    assert {status for status, _ in lines.values()} == {"ok", "note"}
    assert lines["duplicate tiles"] == ("ok", "none among the first 8")


@pytest.mark.parametrize(
    ("fault", "line", "words"),
    [
        ("masks", "masks", "process 1: no patch of the probe batch is masked"),
        ("teacher", "teacher: backbone", "process 1: nothing was loaded for it"),
        ("forward", "masks", "process 1: could not be carried out"),
    ],
)
def test_what_one_process_finds_stops_both(folder, fault, line, words):
    outcome = outcome_of(folder, fault)
    wrong = {name: text for name, status, text in outcome["lines"] if status == "wrong"}
    assert wrong[line].startswith(words)
    assert wrong[line] in outcome["error"]
    assert json.loads((folder / fault / "self_check.json").read_text())["wrong"] == len(wrong)


def test_a_tile_that_one_process_cannot_read_stops_both(folder):
    assert "can not read image for sample" in outcome_of(folder, "tile")["error"]
    assert not (folder / "tile" / "self_check.json").exists()
