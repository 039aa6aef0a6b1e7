"""Runs that are killed again and again end with what they would have come to undisturbed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dinov2.errors import WeightsError
from dinov2.fsdp.layout import read_manifest
from tests.checkpoints import read_state
from tests.conftest import REPO

KILLS = 30
ITERATIONS = 240
TIMED = {"iter_time", "data_time", "images_per_second", "max_mem_mib"}


class Storm:
    """Starts a run, kills it at a random moment once it takes steps, and looks at what is left."""

    def __init__(self, tiny, output: Path, processes: int, seed: int, iterations: int) -> None:
        self.output, self.processes = output, processes
        self.random = random.Random(seed)
        command = [sys.executable, "-m", "tests.train.storm_server"]
        command += ["--config-file", str(tiny.config), "--output-dir", str(output)]
        command += [f"train.dataset_path={tiny.dataset}", f"optim.max_iterations={iterations}"]
        command += ["checkpointing.period=2", "train.self_check=off", "train.device=cpu"]
        command += ["dino.head_n_prototypes=4096", "evaluation.eval_period_iterations=0"]
        self.log = output.parent / f"{output.name}.log"
        self.while_saving = self.of_one = 0
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
        with self.log.open("ab") as log:
            self.server = subprocess.Popen(
                command,
                env=env,
                cwd=REPO,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def start(self) -> list[int]:
        self.server.stdin.write(f"{self.processes}\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def statuses(self) -> list[int]:
        return json.loads(self.server.stdout.readline())

    def finish(self) -> None:
        self.start()
        assert set(self.statuses()) == {0}, self.log.read_text()[-3000:]
        self.server.stdin.close()
        assert self.server.wait(timeout=60) == 0

    def kill_once(self) -> None:
        before = self.rows()
        ranks = self.start()
        while self.rows() <= before:
            before = min(before, self.rows())  # rows that are written again are dropped at the start
            assert all(map(alive, ranks)), self.log.read_text()[-3000:]
            time.sleep(0.01)
        time.sleep(self.random.uniform(0, 0.8))
        assert all(map(alive, ranks)), "the run ended before it could be killed: make it longer"
        self.while_saving += any(self.output.glob(".model_*.tmp"))
        victims = ranks
        if len(ranks) > 1 and self.random.random() < 0.5:
            self.of_one += 1
            victims = [self.random.choice(ranks)]
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        assert all(status != 0 for status in self.statuses())  # the other one ends by itself
        self.check_what_is_left()

    def rows(self) -> int:
        path = self.output / "training_metrics.json"
        return path.read_bytes().count(b"\n") if path.is_file() else 0

    def check_what_is_left(self) -> None:
        """Every checkpoint whose manifest is good can be loaded."""
        for folder in self.output.glob("model_*"):
            try:
                manifest = read_manifest(folder)
            except WeightsError:
                continue
            assert read_state(folder)["iteration"] == manifest.iteration


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def losses(folder: Path) -> list[dict]:
    rows = map(json.loads, (folder / "training_metrics.json").read_text().splitlines())
    return [{name: value for name, value in row.items() if name not in TIMED} for row in rows]


def require_equal(expected, got, name="state") -> None:
    if isinstance(expected, torch.Tensor):
        assert torch.equal(expected, got), name
    elif isinstance(expected, dict):
        assert expected.keys() == got.keys(), name
        for key, value in expected.items():
            require_equal(value, got[key], f"{name}.{key}")
    else:
        assert expected == got, name


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_kill_storm_changes_nothing(tiny, tmp_path, processes):
    kills = int(os.environ.get("STORM_KILLS", KILLS))
    iterations = ITERATIONS * kills // KILLS
    whole = Storm(tiny, tmp_path / "whole", processes, 0, iterations)
    whole.finish()
    storm = Storm(tiny, tmp_path / "storm", processes, processes, iterations)
    for _ in range(kills):
        storm.kill_once()
    storm.finish()
    assert storm.while_saving, "no kill hit a save"

    expected, got = (read_state(run.output / "model_final") for run in (whole, storm))
    for state in (expected, got):
        del state["config"]["train"]["output_dir"]
    require_equal(expected, got)
    assert losses(whole.output) == losses(storm.output)
    assert len(losses(storm.output)) == iterations
    assert not list(storm.output.glob(".model_*"))
    report = f"{kills} kills, {storm.while_saving} during a save, {storm.of_one} of one process only\n"
    (tmp_path / "report.txt").write_text(report)
