"""Metrics in TensorBoard and Weights & Biases."""

import importlib.util
import logging
import time
from types import SimpleNamespace

import pytest

from dinov2.errors import ConfigError
from dinov2.logging import MetricLogger
from dinov2.logging.sinks import Sinks, _run_id, open_sinks, require_packages


def tracking(**settings):
    return SimpleNamespace(**{"tensorboard": False, "wandb": "off", "wandb_project": "dinov2"} | settings)


def events(folder, name):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    return [(event.step, event.value) for event in found.Scalars(name)]


def test_rows_of_the_metrics_file_reach_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    metrics = MetricLogger(output_file=str(tmp_path / "rows.json"))
    with open_sinks(tracking(tensorboard=True), tmp_path) as metrics.sinks:
        for iteration in range(3):
            metrics.update(total_loss=8.0 - iteration)
            metrics.dump_in_output_file(iteration, 0.5, 0.25, images_per_second=float("nan"))
        metrics.sinks.write(2, {"eval/rankme": 30.5})
    folder = tmp_path / "tensorboard"
    assert events(folder, "train/total_loss") == [(0, 8.0), (1, 7.0), (2, 7.0)]  # medians of the window
    assert events(folder, "train/data_time") == [(0, 0.25), (1, 0.25), (2, 0.25)]
    assert events(folder, "eval/rankme") == [(2, 30.5)]
    with pytest.raises(KeyError):
        events(folder, "train/images_per_second")


def test_rows_that_are_done_again_replace_the_old_ones(tmp_path):
    pytest.importorskip("tensorboard")
    for start, value in ((0, 1.0), (3, 2.0)):
        with open_sinks(tracking(tensorboard=True), tmp_path, start_iteration=start) as sinks:
            for iteration in range(start, 5):
                sinks.write(iteration, {"x": value})
    assert events(tmp_path / "tensorboard", "x") == [(0, 1.0), (1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]


def test_a_run_that_goes_back_hides_the_rows_it_writes_again(tmp_path):
    pytest.importorskip("tensorboard")
    with open_sinks(tracking(tensorboard=True), tmp_path) as sinks:
        for iteration in range(4):
            sinks.write(iteration, {"x": 1.0})
        sinks.rewind(2)
        for iteration in range(2, 5):
            sinks.write(iteration, {"x": 2.0})
    assert events(tmp_path / "tensorboard", "x") == [(0, 1.0), (1, 1.0), (2, 2.0), (3, 2.0), (4, 2.0)]


def test_a_run_that_starts_anew_in_a_folder_has_an_id_of_its_own(tmp_path):
    first = _run_id(tmp_path, continues=False)
    assert [_run_id(tmp_path, continues=True) for _ in range(2)] == [first, first]
    second = _run_id(tmp_path, continues=False)
    assert second != first and _run_id(tmp_path, continues=True) == second


@pytest.mark.slow
def test_wandb_works_without_an_account(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with open_sinks(tracking(wandb="offline"), tmp_path / "run", config={"a": 1}) as sinks:
        sinks.write(0, {"train/total_loss": 1.0})
        sinks.write(1, {"train/total_loss": 0.5})
    (folder,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    (record,) = folder.glob("run-*.wandb")
    deadline = time.monotonic() + 60  # a process of the package writes it, and on a busy machine is late
    while b"train/total_loss" not in record.read_bytes():
        assert time.monotonic() < deadline, "nothing was recorded"
        time.sleep(0.1)


def test_nothing_is_written_unless_asked_for(tmp_path):
    with open_sinks(tracking(), tmp_path) as sinks:
        sinks.write(0, {"x": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_only_the_main_process_has_sinks(tmp_path, monkeypatch):
    monkeypatch.setattr("dinov2.distributed.is_main_process", lambda: False)
    with open_sinks(tracking(tensorboard=True), tmp_path) as sinks:
        sinks.write(0, {"x": 1.0})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("package", "settings"), [("tensorboard", {"tensorboard": True}), ("wandb", {"wandb": "offline"})]
)
def test_a_missing_package_is_named_before_the_run(monkeypatch, package, settings):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(
        ConfigError, match=f"needs the package {package}, which is not installed.*or set tracking"
    ):
        require_packages(tracking(**settings))
    require_packages(tracking())


def test_a_sink_that_fails_is_left_out(caplog):
    class Full:
        def write(self, iteration, scalars):
            raise OSError("No space left on device")

        def close(self):
            raise AssertionError("closed although it was left out")

    class Kept(list):
        def write(self, iteration, scalars):
            self.append((iteration, dict(scalars)))

        def close(self):
            self.append("closed")

    kept = Kept()
    with caplog.at_level(logging.WARNING, "dinov2"), Sinks([Full(), kept]) as sinks:
        sinks.write(0, {"x": 1.0, "y": float("inf")})
        sinks.write(1, {"x": 2.0})
    assert kept == [(0, {"x": 1.0}), (1, {"x": 2.0}), "closed"]
    assert caplog.text.count("No space left on device") == 1
