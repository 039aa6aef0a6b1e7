"""A run whose metrics go to TensorBoard, too."""

import json

import pytest

from dinov2.train.monitoring.records import RECORDS_FILE, read_records


def test_the_rows_of_a_run_reach_tensorboard(tmp_path, tiny):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    output = tmp_path / "run"
    tiny.start(output, "tracking.tensorboard=true", "evaluation.monitor_period=4")
    rows = [json.loads(line) for line in (output / "training_metrics.json").read_text().splitlines()]
    found = accumulator.EventAccumulator(str(output / "tensorboard"))
    found.Reload()
    shown = [(event.step, event.value) for event in found.Scalars("train/total_loss")]
    assert [step for step, _ in shown] == [row["iteration"] for row in rows]
    assert [value for _, value in shown] == pytest.approx([row["total_loss"] for row in rows])
    records = read_records(output / RECORDS_FILE)
    assert [record.iteration for record in records] == [0, 4, 6]
    judged = [(event.step, event.value) for event in found.Scalars("eval/rankme")]
    assert [step for step, _ in judged] == [0, 3, 5]
    assert [value for _, value in judged] == pytest.approx([r.signals["rankme"] for r in records])
