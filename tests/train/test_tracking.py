"""A run whose metrics go to TensorBoard, too."""

import json

import pytest


def test_the_rows_of_a_run_reach_tensorboard(tmp_path, tiny):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    output = tmp_path / "run"
    tiny.start(output, "tracking.tensorboard=true")
    rows = [json.loads(line) for line in (output / "training_metrics.json").read_text().splitlines()]
    found = accumulator.EventAccumulator(str(output / "tensorboard"))
    found.Reload()
    shown = [(event.step, event.value) for event in found.Scalars("train/total_loss")]
    assert [step for step, _ in shown] == [row["iteration"] for row in rows]
    assert [value for _, value in shown] == pytest.approx([row["total_loss"] for row in rows])
