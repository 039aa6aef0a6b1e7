"""Real runs that are resumed on other numbers of processes draw every tile of a pass once."""

import shutil

import pytest
import torch

from dinov2.fsdp.consolidate import one_file_state
from tests.checkpoints import read_state
from tests.distributed.launch import run_script
from tests.train.order_worker import train

TILES = 24
EVERYTHING = list(range(TILES))


class Run:
    """One output directory, to be continued with other settings."""

    def __init__(self, tiny, folder):
        self.output, self.records = folder / "run", folder / "records"
        self.options = ["--config-file", str(tiny.config), "--output-dir", str(self.output)]
        self.options += [f"train.dataset_path={tiny.dataset}", "train.self_check=off", "train.device=cpu"]
        self.stages = 0

    def go_on(self, world_size: int, until: int, *overrides: str) -> list[list[int]]:
        """Train to iteration ``until`` and return what each process drew."""
        self.stages += 1
        records = self.records / str(self.stages)
        words = [str(records), *self.options, f"optim.max_iterations={until}", *overrides]
        if world_size == 1:
            train(*words)
        else:
            run_script("tests/train/order_worker.py", *words, world_size=world_size)
        files = [records / f"rank_{rank}.txt" for rank in range(world_size)]
        return [list(map(int, file.read_text().split())) for file in files]

    def stored(self):
        return read_state(self.output / "model_final")["data_order"]


@pytest.fixture
def run(tiny, tmp_path):
    return Run(tiny, tmp_path)


@pytest.mark.slow
def test_two_processes_then_one_then_two(run):
    """Batches of 4, 3 and 4: 16 tiles, then 8 + 1, then 23 and one of the next pass."""
    drawn = run.go_on(2, 2, "optim.warmup_epochs=0", "optim.freeze_last_layer_epochs=0")
    assert [len(of_rank) for of_rank in drawn] == [8, 8]
    first_pass = drawn[0] + drawn[1]
    assert run.stored()["segments"] == [[2, 8]]

    (alone,) = run.go_on(1, 5, "train.batch_size_per_gpu=3")
    assert len(alone) == 9
    assert sorted(first_pass + alone[:8]) == EVERYTHING
    assert run.stored()["segments"] == [[2, 8], [1, 9]]

    drawn = run.go_on(2, 8)
    assert [len(of_rank) for of_rank in drawn] == [12, 12]
    # The row of 23 is dealt in turn, so the second process is the first to begin the next pass.
    assert sorted(alone[8:] + drawn[0] + drawn[1][:11]) == EVERYTHING
    assert run.stored()["segments"] == [[2, 8], [1, 9], [2, 12]]


def test_another_batch_size_continues_the_same_stream(run, tiny, tmp_path):
    (first,) = run.go_on(1, 3, "train.sampler_type=infinite")
    (second,) = run.go_on(1, 7, "train.sampler_type=infinite", "train.batch_size_per_gpu=5")
    whole = Run(tiny, tmp_path / "whole").go_on(1, 8, "train.sampler_type=infinite")[0]
    assert first + second == whole
    assert run.stored()["segments"] == [[1, 32]]


def test_a_checkpoint_without_the_entry_counts_its_iterations(run, tiny, tmp_path):
    """As older versions and upstream write them."""
    (first,) = run.go_on(1, 3)
    folder = run.output / "model_final"
    state = one_file_state(folder)
    shutil.rmtree(folder)
    del state["data_order"]
    torch.save(state, run.output / "model_final.rank_0.pth")
    (second,) = run.go_on(1, 5)
    assert first + second == Run(tiny, tmp_path / "whole").go_on(1, 5)[0]
    assert run.stored()["segments"] == [[1, 20]]


def test_another_seed_begins_anew_and_says_so(run):
    run.go_on(1, 3)
    (again,) = run.go_on(1, 9, "train.seed=1")
    assert sorted(again) == EVERYTHING
    assert "train.seed was 0 and is 1" in (run.output / "logs" / "log.txt").read_text()
    assert run.stored() == {
        "seed": 1,
        "sampler_type": "sharded_infinite",
        "sample_count": TILES,
        "segments": [[1, 24]],
        "given_up": 12,
    }
