"""Evaluation in the loop in several processes over gloo, with sharded networks."""

import json

import pytest
import torch
from omegaconf import OmegaConf

from tests.distributed.launch import run_script
from tests.train import monitoring_worker
from tests.train.test_monitoring import MONITORED, labelled_folder, labels  # noqa: F401

SHARDED = ("FULL_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD")
PARTS = [f"{network}.{part}" for network in ("student", "teacher") for part in ("backbone", "dino_head")]


def sharding(strategy):
    return [f"compute_precision.{part}.sharding_strategy={strategy}" for part in PARTS]


def run(tiny, folder, overrides, cases, processes):
    folder.mkdir()
    whole = ("optim.scaling_rule=none", "optim.lr=0.01", "optim.warmup_epochs=0")
    OmegaConf.save(tiny.resolve(*MONITORED, *whole, *overrides), folder / "config.yaml")
    (folder / "cases.json").write_text(json.dumps(cases))
    arguments = [str(folder / "config.yaml"), str(folder / "cases.json"), str(folder)]
    if processes == 1:
        monitoring_worker.main(*arguments)
    else:
        run_script("tests/train/monitoring_worker.py", *arguments, world_size=processes)
    return {name: torch.load(folder / f"{name}.pt", weights_only=True) for name in cases}


@pytest.mark.slow
def test_two_processes_find_what_one_finds_and_training_goes_on_as_without(tiny, tmp_path, labelled_folder):  # noqa: F811
    """Five batches, so that the second process has one fewer."""
    overrides = [*labels(labelled_folder), "evaluation.batch_size=4", "evaluation.monitor_samples=18"]
    start = {"evaluate": True, "steps": 0}
    one = run(tiny, tmp_path / "one", overrides, {"start": {"overrides": [], **start}}, 1)
    full = sharding("FULL_SHARD")
    cases = {
        "evaluated": {"overrides": full, "evaluate": True, "steps": 4},
        "quiet": {"overrides": full, "evaluate": False, "steps": 4},
    }
    two = run(tiny, tmp_path / "two", overrides, cases, 2)
    assert two["evaluated"]["records"][0] == one["start"]["records"][0]
    first, second = map(json.loads, two["evaluated"]["records"])
    assert second["iteration"] == 2
    assert first["signals"]["student_rankme"] != second["signals"]["student_rankme"], "nothing was learned"
    assert two["evaluated"]["losses"] == two["quiet"]["losses"]
    expected = two["quiet"]["state"]
    assert all(torch.equal(value, expected[name]) for name, value in two["evaluated"]["state"].items())


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_no_number_of_processes_and_no_strategy_changes_a_record(
    tiny,
    tmp_path,
    labelled_folder,  # noqa: F811
    processes,
):
    overrides = [*labels(labelled_folder), "evaluation.batch_size=5", "evaluation.monitor_samples=17"]
    start = {"evaluate": True, "steps": 0}
    one = run(tiny, tmp_path / "one", overrides, {"start": {"overrides": [], **start}}, 1)
    cases = {name: {"overrides": sharding(name), **start} for name in ("NO_SHARD", *SHARDED)}
    several = run(tiny, tmp_path / "several", overrides, cases, processes)
    for name in cases:
        assert several[name]["records"] == one["start"]["records"], name


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["SHARD_GRAD_OP", "NO_SHARD"])
@pytest.mark.parametrize("more", [[], ["student.lora_rank=2"]], ids=["whole", "lora"])
def test_training_does_not_notice_in_two_processes(tiny, tmp_path, strategy, more):
    cases = {
        name: {"overrides": [*sharding(strategy), *more], "evaluate": name == "evaluated", "steps": 4}
        for name in ("evaluated", "quiet")
    }
    two = run(tiny, tmp_path / "two", [], cases, 2)
    assert two["evaluated"]["losses"] == two["quiet"]["losses"]
    expected = two["quiet"]["state"]
    assert all(torch.equal(value, expected[name]) for name, value in two["evaluated"]["state"].items())
