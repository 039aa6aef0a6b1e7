"""Accumulating k batches on W processes is the run of k * W processes, whatever k and W."""

import json
from dataclasses import dataclass

import pytest
import torch

from dinov2 import distributed
from dinov2.data.unreadable import UNREADABLE
from dinov2.train.input import build_data_loader, build_dataset, in_steps
from tests.distributed.launch import run_script
from tests.train.accumulation_worker import train

STEPS, BROKEN_OFF = 10, 7
# All that could tell micro-batches from processes: random masks, stochastic depth, statistics of both kinds.
SETTINGS = [
    "student.drop_path_rate=0.3",
    "ibot.mask_sample_probability=0.5",
    "train.batch_size_per_gpu=3",
    f"optim.max_iterations={STEPS}",
    "optim.warmup_epochs=0",
    "optim.freeze_last_layer_epochs=0",
    "checkpointing.period=5",
    "evaluation.eval_period_iterations=0",
    "train.device=cpu",
]
CENTERING = [
    "train.centering=centering",
    "ibot.separate_head=true",
    "ibot.head_n_prototypes=32",
    "ibot.head_hidden_dim=32",
    "ibot.head_bottleneck_dim=16",
]
SINKHORN = ["train.centering=sinkhorn_knopp"]


@dataclass
class Trained:
    draws: list[list[str]]  # of each stream
    masks: list[list[torch.Tensor]]  # of each step, in the order of the streams
    losses: list[dict[str, float]]  # of each step
    norms: list[dict[str, float]]
    metrics: list[dict[str, float]]
    state: dict[str, torch.Tensor]


class Run:
    """One output directory, to be trained on with other numbers of processes and micro-batches."""

    def __init__(self, tiny, folder, *settings):
        self.output, self.records = folder / "run", folder / "records"
        self.options = ["--config-file", str(tiny.config), "--output-dir", str(self.output)]
        self.options += [f"train.dataset_path={tiny.dataset}", *SETTINGS, *settings]
        self.stages = 0

    def train(self, processes, accumulate, *, stop_before=0):
        """Train to the end, or break off after so many steps."""
        self.stages += 1
        records = self.records / str(self.stages)
        words = [str(records), str(stop_before), *self.options, f"optim.accumulate_steps={accumulate}"]
        if processes == 1:
            train(*words)
        else:
            run_script("tests/train/accumulation_worker.py", *words, world_size=processes)
        steps = [torch.load(records / f"steps_{rank}.pt", weights_only=True) for rank in range(processes)]
        streams = [records / f"stream_{stream}.txt" for stream in range(processes * accumulate)]
        return Trained(
            draws=[stream.read_text().splitlines() for stream in streams],
            masks=[[mask for part in step for mask in part["masks"]] for step in zip(*steps, strict=True)],
            losses=[step["losses"] for step in steps[0]],
            norms=[step["grad_norms"] for step in steps[0]],
            metrics=list(map(json.loads, (self.output / "training_metrics.json").read_text().splitlines())),
            state=torch.load(records / "state.pt", weights_only=True),
        )


def assert_same(expected, got, tolerance):
    """Compare a run with another, or with the last steps of another."""
    steps = len(got.losses)
    for one, other in zip(expected.draws, got.draws, strict=True):
        assert one[-len(other) :] == other, "other samples, or other crops of them"
    for one, other in zip(expected.masks[-steps:], got.masks, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    for one, other in zip(expected.losses[-steps:], got.losses, strict=True):
        assert other == pytest.approx(one, rel=tolerance)
    for one, other in zip(expected.norms[-steps:], got.norms, strict=True):
        assert other == pytest.approx(one, rel=10 * tolerance)
    for one, other in zip(expected.metrics[-steps:], got.metrics[-steps:], strict=True):
        compared = {name: value for name, value in one.items() if name.endswith(("loss", "lr", "iteration"))}
        assert {name: other[name] for name in compared} == pytest.approx(compared, rel=tolerance)
    assert expected.state.keys() == got.state.keys()
    for name, tensor in expected.state.items():
        found = got.state[name]
        if name.endswith("attn.qkv.bias"):
            # Softmax ignores the key bias: its gradient is rounding noise, which Adam scales up.
            tensor, found = (torch.cat((x.chunk(3)[0], x.chunk(3)[2])) for x in (tensor, found))
        assert (found - tensor).norm() <= tolerance * tensor.norm() + 1e-7, name


def assert_learned(run):
    assert abs(run.losses[0]["total_loss"] - run.losses[-1]["total_loss"]) > 0.1
    assert run.losses[0]["koleo_loss"] != 0
    assert len({str(mask) for step in run.masks for mask in step}) > STEPS


@pytest.mark.slow
def test_one_process_with_two_batches_is_two_processes(tiny, tmp_path):
    two = Run(tiny, tmp_path / "two", *SINKHORN).train(2, 1)
    one = Run(tiny, tmp_path / "one", *SINKHORN).train(1, 2)
    assert_learned(two)
    assert_same(two, one, 1e-5)
    assert one.metrics[0]["current_batch_size"] == 6.0 == 2 * two.metrics[0]["current_batch_size"]


@pytest.mark.slow
def test_a_run_goes_on_with_processes_for_batches(tiny, tmp_path):
    """Broken off in one process after a checkpoint, continued in two."""
    whole = Run(tiny, tmp_path / "whole", *CENTERING).train(1, 2)
    assert_learned(whole)
    run = Run(tiny, tmp_path / "run", *CENTERING)
    broken_off = run.train(1, 2, stop_before=BROKEN_OFF)
    assert len(broken_off.losses) == BROKEN_OFF
    rest = run.train(2, 1)
    assert len(rest.losses) == STEPS - 5
    assert_same(whole, rest, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [CENTERING, SINKHORN], ids=["centering", "sinkhorn"])
def test_four_streams_however_they_are_shared_out(tiny, tmp_path, settings):
    four = Run(tiny, tmp_path / "four", *settings).train(4, 1)
    assert_learned(four)
    assert_same(four, Run(tiny, tmp_path / "two", *settings).train(2, 2), 1e-5)
    assert_same(four, Run(tiny, tmp_path / "one", *settings).train(1, 4), 1e-5)
    run = Run(tiny, tmp_path / "run", *settings)
    run.train(2, 2, stop_before=BROKEN_OFF)
    assert_same(four, run.train(1, 4), 1e-5)


def batches_of(cfg, count, monkeypatch, rank=0, world_size=1):
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "get_global_rank", lambda: rank)
        patch.setattr(distributed, "get_global_size", lambda: world_size)
        loader = build_data_loader(cfg, build_dataset(cfg), start_iteration=2)
        steps = in_steps(loader, cfg.optim.accumulate_steps)
        return [next(steps) for _ in range(count)]


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return one == other


@pytest.mark.parametrize("workers", [0, 2])
def test_micro_batches_are_those_of_the_processes_they_stand_for(
    tiny, tile_folder, tmp_path, monkeypatch, workers
):
    """Replaced samples included; 2 processes of 3 streams each stand for 6 processes."""
    for file in (tile_folder / "nest").iterdir():
        damaged = int(file.stem) % 5 == 0
        target = tmp_path / "damaged" / "nest" / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(b"" if damaged else file.read_bytes())
    settings = [f"train.num_workers={workers}", f"train.dataset_path=ImageFolder:root={tmp_path / 'damaged'}"]
    alone = tiny.resolve(*settings)
    shared = tiny.resolve(*settings, "optim.accumulate_steps=3")
    failures = 0
    for rank in range(2):
        steps = batches_of(shared, 2, monkeypatch, rank, world_size=2)
        for number in range(3):
            expected = batches_of(alone, 2, monkeypatch, 3 * rank + number, world_size=6)
            for (single,), step in zip(expected, steps, strict=True):
                assert single.keys() == step[number].keys()
                assert all(same(single[key], step[number][key]) for key in single)
                failures += len(single.get(UNREADABLE, ()))
    assert failures > 0
