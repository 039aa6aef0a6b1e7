"""Meters, the progress loop, its JSON lines, and their agreement over two processes."""

import io
import itertools
import json
import logging
import math
import random

import pytest
import torch

from dinov2 import distributed
from dinov2.logging import MetricLogger, SmoothedValue, setup_logging
from tests.distributed.launch import run_in_processes


def test_smoothed_value_agrees_with_torch_on_the_window():
    generator = random.Random(0)
    values = [generator.uniform(-5, 5) for _ in range(57)]
    meter = SmoothedValue(window_size=20)
    for count, value in enumerate(values, start=1):
        meter.update(value)
        window = torch.tensor(values[max(0, count - 20) : count], dtype=torch.float64)
        assert meter.median == window.median().item()  # torch also takes the lower one of two
        assert meter.avg == pytest.approx(window.mean().item())
        assert meter.max == window.max().item()
        assert meter.value == value
        assert meter.global_avg == pytest.approx(sum(values[:count]) / count)


def test_a_weighted_update_counts_in_the_global_average_only():
    meter = SmoothedValue()
    meter.update(1.0)
    meter.update(4.0, num=3)
    assert meter.global_avg == pytest.approx(13 / 4)
    assert meter.avg == pytest.approx(2.5)


def test_formats():
    meter = SmoothedValue()
    meter.update(1.0)
    meter.update(2.0)
    assert str(meter) == "1.0000 (1.5000)"
    meter.fmt = "{value:.1f} {max:.1f} {avg:.2f}"
    assert str(meter) == "2.0 2.0 1.50"


def test_metric_logger_gives_its_meters_as_attributes():
    metrics = MetricLogger(delimiter="  ")
    metrics.update(loss=torch.tensor(2.0), lr=0.5)
    metrics.add_meter("wide", SmoothedValue(window_size=1, fmt="{value:.0f}"))
    metrics.update(wide=3)
    assert metrics.loss.value == 2.0
    assert str(metrics) == "loss: 2.0000 (2.0000)  lr: 0.5000 (0.5000)  wide: 3"
    with pytest.raises(AttributeError, match="absent"):
        _ = metrics.absent


def test_state_survives_a_restart():
    metrics, restored = MetricLogger(), MetricLogger()
    for i in range(30):
        metrics.update(loss=float(i))
    restored.load_state_dict(json.loads(json.dumps(metrics.state_dict())))
    for each in (metrics, restored):
        each.update(loss=-1.0)
    assert restored.state_dict() == metrics.state_dict()
    assert str(restored) == str(metrics)


@pytest.mark.parametrize(("start", "end"), [(0, 7), (3, 7), (7, 7), (9, 7)])
def test_log_every_takes_exactly_the_missing_steps_and_draws_nothing_more(start, end):
    source = itertools.count()
    taken = list(MetricLogger().log_every(source, 2, "Training", end, start))
    assert taken == list(range(max(end - start, 0)))
    assert next(source) == len(taken)


def test_the_last_of_items_that_end_early_has_a_row(tmp_path):
    metrics = MetricLogger(output_file=str(tmp_path / "rows.json"))
    taken = []
    for item in metrics.log_every(range(6), 10, "Training", 10, 0, ends=lambda: taken == [0, 1, 2]):
        taken.append(item)
    rows = [json.loads(line) for line in (tmp_path / "rows.json").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [0, 2]


def test_log_every_without_a_number_goes_through_everything():
    assert list(MetricLogger().log_every([5, 6, 7], 10)) == [5, 6, 7]
    assert list(MetricLogger().log_every([5, 6], 10, n_iterations=4)) == [5, 6]


def test_rows_are_those_of_upstream(tmp_path):
    metrics = MetricLogger(delimiter="  ", output_file=str(tmp_path / "training_metrics.json"))
    for i in metrics.log_every(itertools.count(), 10, "Training", 45, 0):
        metrics.update(lr=0.1 * i, total_loss=float(i * i % 37))
    rows = [json.loads(line) for line in (tmp_path / "training_metrics.json").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [0, 10, 20, 30, 40, 44]
    assert list(rows[0]) == ["iteration", "iter_time", "data_time", "lr", "total_loss"]
    for row in rows:
        window = range(max(0, row["iteration"] - 19), row["iteration"] + 1)
        expected = torch.tensor([float(i * i % 37) for i in window]).median().item()
        assert row["total_loss"] == expected


def test_a_value_that_is_not_finite_leaves_the_row_valid_json(tmp_path):
    metrics = MetricLogger(output_file=str(tmp_path / "m.json"))
    metrics.update(loss=math.inf)
    metrics.dump_in_output_file(3, math.nan, 0.5)

    def refuse(constant):
        raise ValueError(constant)

    row = json.loads((tmp_path / "m.json").read_text(), parse_constant=refuse)
    assert row == {"iteration": 3, "iter_time": None, "data_time": 0.5, "loss": None}


def test_a_full_disk_loses_rows_and_warns_once_each_way(tmp_path, caplog):
    path = tmp_path / "m.json"
    path.symlink_to("/dev/full")
    metrics = MetricLogger(output_file=str(path))
    for iteration in range(3):
        metrics.dump_in_output_file(iteration, 1.0, 0.5)
    (warning,) = caplog.messages
    assert "No space left" in warning and str(path) in warning
    path.unlink()
    for iteration in (3, 4):
        metrics.dump_in_output_file(iteration, 1.0, 0.5)
    assert [json.loads(line)["iteration"] for line in path.read_text().splitlines()] == [3, 4]
    assert caplog.messages[1:] == [f"{path} can be written again; 3 rows missing"]


def test_a_row_that_only_fits_in_part_is_taken_back(tmp_path, monkeypatch):
    class Short(io.FileIO):
        def write(self, data):
            return super().write(bytes(data)[:4])

    path = tmp_path / "m.json"
    metrics = MetricLogger(output_file=str(path))
    metrics.dump_in_output_file(0, 1.0, 0.5)
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(type(path), "open", lambda self, mode, **_: Short(self, "a"))
        metrics.dump_in_output_file(1, 1.0, 0.5)
    assert path.read_bytes() == before


def test_the_long_line_shows_every_meter(caplog):
    caplog.set_level(logging.INFO, logger="dinov2")
    metrics = MetricLogger(delimiter="  ")
    for i in metrics.log_every(range(3), 10, "Test:"):
        metrics.update(acc=float(i))
    first, last, total = caplog.messages
    assert first.startswith("Test:  [0/3]  eta: 0:00:00  acc: 0.0000 (0.0000)  time: 0.")
    assert "acc: 1.0000 (1.0000)" in last
    assert "  data: 0." in last
    assert total.startswith("Test: Total time: 0:00:00 (")


def test_the_short_line_has_rate_data_wait_and_losses(caplog, tmp_path):
    caplog.set_level(logging.INFO, logger="dinov2")
    metrics = MetricLogger(delimiter="  ", output_file=str(tmp_path / "m.json"))
    for _ in metrics.log_every(itertools.count(), 10, "Training", 101, 100, images_per_iteration=64):
        metrics.update(lr=0.1, mom=0.9, total_loss=3.0, ibot_loss=1.0)
    line = caplog.messages[0]
    assert line.startswith("Training  [100/101]  eta: 0:00:00  images/s: ")
    assert "  data wait: " in line
    assert "  total_loss: 3.0000  ibot_loss: 1.0000" in line
    assert "mom" not in line
    row = json.loads((tmp_path / "m.json").read_text())
    assert row["images_per_second"] == pytest.approx(64 / row["iter_time"])
    assert row["mom"] == 0.9


def test_the_short_line_shows_chosen_meters(caplog):
    caplog.set_level(logging.INFO, logger="dinov2")
    metrics = MetricLogger(delimiter="  ")
    for _ in metrics.log_every(range(1), 1, images_per_iteration=1, shown=["lr"]):
        metrics.update(lr=0.25, total_loss=3.0)
    assert caplog.messages[0].split("  ")[4:] == ["lr: 0.2500"]


def _log_as_one_of_two(folder):
    collectives = []
    reduce = torch.distributed.all_reduce
    torch.distributed.all_reduce = lambda *args, **kwargs: collectives.append(1) or reduce(*args, **kwargs)
    rank = distributed.get_global_rank()
    setup_logging(folder, level=logging.INFO)
    metrics = MetricLogger(output_file=f"{folder}/metrics.json")
    names = ("a", "b") if rank == 0 else ("b", "a")  # the order of first use may differ
    for step in range(rank + 1):
        metrics.update(**{name: 10.0 * rank + step + (name == "b") for name in names})
    metrics.dump_in_output_file(rank, 0.0, 0.0)
    metrics.synchronize_between_processes()
    logging.getLogger("dinov2").info("I am rank %d", rank)
    return metrics.a.global_avg, metrics.b.global_avg, metrics.a.count, len(collectives)


@pytest.mark.slow
def test_two_processes_agree_in_one_collective_and_write_their_own_files(tmp_path):
    outcomes = run_in_processes(_log_as_one_of_two, str(tmp_path))
    average = (0.0 + 10.0 + 11.0) / 3
    assert outcomes == [(pytest.approx(average), pytest.approx(average + 1), 3, 1)] * 2
    rows = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [0]
    assert (tmp_path / "logs" / "log.txt").read_text().endswith("I am rank 0\n")
    assert (tmp_path / "logs" / "log.txt.rank1").read_text().endswith("I am rank 1\n")
