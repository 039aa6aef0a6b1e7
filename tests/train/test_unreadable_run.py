"""Runs over tiles of which some can not be read, in one process and in two."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

from dinov2.errors import UnreadableImagesError
from tests.checkpoints import read_state
from tests.conftest import REPO
from tests.train.conftest import TinyRun

BAD = 3


@pytest.fixture(scope="module")
def damaged_folder(tile_folder, tmp_path_factory):
    """The 24 tiles, three of them damaged: empty, cut, and no image."""
    folder = tmp_path_factory.mktemp("damaged") / "tiles"
    shutil.copytree(tile_folder, folder)
    (folder / "nest" / "05.png").write_bytes(b"")
    cut = folder / "nest" / "11.png"
    cut.write_bytes(cut.read_bytes()[:700])
    (folder / "nest" / "17.png").write_text("no image")
    return folder


@pytest.fixture
def damaged(tmp_path, damaged_folder):
    return TinyRun(tmp_path, damaged_folder)


def listed(folder):
    with (folder / "unreadable_images.tsv").open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def rows(folder):
    return [json.loads(line) for line in (folder / "training_metrics.json").read_text().splitlines()]


def weights(folder, name="model_final"):
    return read_state(folder / name)["model"]


@pytest.mark.slow
def test_a_run_goes_on_without_them_and_tells(damaged, tmp_path):
    tolerant = ("train.max_bad_fraction=1", "checkpointing.period=3")
    for workers in (0, 2):
        damaged.start(tmp_path / str(workers), *tolerant, f"train.num_workers={workers}")
    alone, helped = listed(tmp_path / "0"), listed(tmp_path / "2")
    assert alone == helped
    assert {row["path"].rsplit("/")[-1] for row in alone} == {"05.png", "11.png", "17.png"}
    assert len(alone) >= BAD
    assert {row["rank"] for row in alone} == {"0"}
    assert [int(row["iteration"]) for row in alone] == sorted(int(row["iteration"]) for row in alone)
    reasons = {row["path"].rsplit("/")[-1]: row["reason"] for row in alone}
    assert reasons["05.png"] == "an empty file (0 bytes)"
    assert "no image of a known format" in reasons["17.png"]
    expected = weights(tmp_path / "0")
    assert all(torch.equal(tensor, weights(tmp_path / "2")[name]) for name, tensor in expected.items())

    log = (tmp_path / "2" / "logs" / "log.txt").read_text()
    assert log.count("another sample replaces the unreadable") == len(alone)
    assert f"{len(alone)} of {24 + len(alone)} images drawn since the start could not be read" in log
    assert {row["current_batch_size"] for row in rows(tmp_path / "2")} == {4.0}
    assert not [name for name in rows(tmp_path / "2")[0] if "unreadable" in name]

    resumed = tmp_path / "resumed"
    resumed.mkdir()
    shutil.copytree(tmp_path / "0" / "model_0000002", resumed / "model_0000002")
    damaged.start(resumed, *tolerant)
    assert all(torch.equal(tensor, weights(resumed)[name]) for name, tensor in expected.items())
    assert listed(resumed) == [row for row in alone if int(row["iteration"]) >= 3]


def test_the_first_one_stops_a_run_that_tolerates_none(damaged, tmp_path):
    with pytest.raises(
        UnreadableImagesError, match=r"max_bad_fraction 0 allows 0 by now; the first are .*\.png"
    ):
        damaged.start(tmp_path / "run", "train.max_bad_fraction=0")
    assert listed(tmp_path / "run")


def test_a_healthy_run_has_no_list(tiny, tmp_path):
    tiny.start(tmp_path / "run", "train.max_bad_fraction=0", "optim.max_iterations=3")
    assert not (tmp_path / "run" / "unreadable_images.tsv").exists()
    assert "could not be read" not in (tmp_path / "run" / "logs" / "log.txt").read_text()


def launch(run, output_dir, *overrides):
    """The command line on two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(REPO / "dinov2/train/train.py"), "--config-file", str(run.config)]
    command += ["--output-dir", str(output_dir), f"train.dataset_path={run.dataset}", *overrides]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=400)


@pytest.mark.slow
def test_two_processes_stop_together_and_leave_the_last_checkpoint(damaged, tmp_path):
    out = tmp_path / "run"
    done = launch(
        *(damaged, out, "train.max_bad_fraction=0.01", "train.num_workers=1", "optim.max_iterations=200"),
        *("checkpointing.period=1", "checkpointing.max_to_keep=100", "train.self_check=off"),
    )
    assert done.returncode != 0
    errors = {line for line in done.stderr.splitlines() if line.startswith("error: ")}
    assert len(errors) == 1, done.stderr[-3000:]
    (error,) = errors
    failures, draws, allowed = map(
        int, re.search(r"error: (\d+) of (\d+) images .* 0.01 allows (\d+) by now", error).groups()
    )
    assert failures > allowed == 10
    found = listed(out)
    assert len(found) == failures
    assert {row["rank"] for row in found} == {"0", "1"}

    stopped_at = int(found[-1]["iteration"])
    assert draws == 2 * 4 * (stopped_at + 1) + failures
    assert len([row for row in found if int(row["iteration"]) < stopped_at]) <= 10
    assert (out / "last_checkpoint.rank_0").read_text() == f"model_{stopped_at - 1:07d}"
    assert weights(out, f"model_{stopped_at - 1:07d}")


@pytest.mark.slow
def test_storage_that_stalls_one_of_two_processes_ends_both(tile_folder, tmp_path):
    """A pipe nobody writes to stands among the tiles."""
    paths = sorted((tile_folder / "nest").iterdir())
    os.mkfifo(tmp_path / "stalled.png")
    (tmp_path / "tiles.csv").write_text(
        "\n".join(["path", *map(str, paths), str(tmp_path / "stalled.png"), ""])
    )
    run = TinyRun(tmp_path, tile_folder)
    run.dataset = f"CustomImageDataset:extra={tmp_path / 'tiles.csv'}"
    done = launch(
        *(run, tmp_path / "run", "train.worker_timeout=10", "train.num_workers=1", "train.self_check=off"),
        *("optim.max_iterations=200", "train.worker_start_method=spawn"),
    )
    assert done.returncode != 0
    assert "error: the data loading processes gave no batch for 10 s (train.worker_timeout)" in done.stderr
    assert "is waiting and owes the next batch" in done.stderr
