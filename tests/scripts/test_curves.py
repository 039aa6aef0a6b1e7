"""Loss curves out of the trainer's JSON lines."""

import json
import xml.etree.ElementTree as ET

import pytest

from scripts.quickstart.curves import line_chart, loss_panels, read_metrics, ticks


@pytest.fixture
def metrics(tmp_path):
    path = tmp_path / "training_metrics.json"
    rows = [
        {"iteration": 0, "iter_time": 1.0, "total_loss": 9.0, "ibot_loss": 2.0, "lr": 0.1},
        {"iteration": 10, "iter_time": 1.0, "total_loss": 8.0, "ibot_loss": None, "lr": 0.1},
        {"iteration": 10, "iter_time": 1.0, "total_loss": 7.0, "ibot_loss": 1.0, "lr": 0.1},
        {"iteration": 20, "iter_time": 1.0, "total_loss": 6.5, "ibot_loss": 0.5, "lr": 0.1},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_metrics(path)


def test_of_repeated_iterations_the_last_row_counts(metrics):
    assert metrics["iteration"] == [0, 10, 20]
    assert metrics["total_loss"] == [9.0, 7.0, 6.5]
    assert metrics["ibot_loss"] == [2.0, 1.0, 0.5]


def test_one_well_formed_panel_per_loss(metrics):
    panels = loss_panels({"seed 0": metrics, "seed 1": metrics})
    assert list(panels) == ["total_loss", "ibot_loss"]
    for panel in panels.values():
        svg = ET.fromstring(panel)
        texts = [text.text for text in svg.iter("{http://www.w3.org/2000/svg}text")]
        assert {"iteration", "loss", "seed 0", "seed 1"} <= set(texts)
        assert len(list(svg.iter("{http://www.w3.org/2000/svg}polyline"))) == 2


def test_a_falling_line_falls_on_the_page(metrics):
    svg = ET.fromstring(line_chart("a < b", {"": ([0, 1, 2], [3.0, 2.0, 1.0])}, x_label="x", y_label="y"))
    points = svg.find("{http://www.w3.org/2000/svg}polyline").get("points").split()
    ys = [float(point.split(",")[1]) for point in points]
    assert ys == sorted(ys)  # y grows downwards


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 10, [0, 5, 10]), (6.7, 7.1, [6.7, 6.8, 6.9, 7.0, 7.1]), (2.0, 2.0, None), (-0.05, 0.03, None)],
)
def test_ticks_are_round_and_enclose(low, high, expected):
    found = ticks(low, high)
    assert found[0] <= low and found[-1] >= high and len(found) >= 2
    if expected:
        assert found == expected


def test_whole_ticks_are_integers_within():
    assert ticks(0, 5, whole=True) == [0, 2, 4]
    assert ticks(0, 1, whole=True) == [0, 1]
