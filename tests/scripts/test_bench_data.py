"""The benchmark's yardstick, its statistics, and its tables."""

import json

import pytest
import torch

from dinov2.errors import ConfigError
from scripts import bench_data
from scripts.bench_data import (
    PIPELINES,
    PLAIN,
    SIGNIFICANCE,
    Timing,
    agreement,
    agreement_table,
    compare_geometry,
    core_table,
    decode,
    get_args_parser,
    main,
    make_files,
    our_pipeline,
    plain_pipeline,
    rate_table,
)
from tests.conftest import REPO


def test_the_yardstick_is_the_reference():
    """Its steps are written out with torchvision alone, and give our reference's crops bit for bit."""
    image = decode(make_files(224)[0])
    torch.manual_seed(3)
    plain = plain_pipeline()(image)
    torch.manual_seed(3)
    ours = our_pipeline("reference")(image)
    for one, other in zip(
        plain["global_crops"] + plain["local_crops"], ours["global_crops"] + ours["local_crops"], strict=True
    ):
        assert torch.equal(one, other)


def worst(found):
    return min(found, key=lambda comparison: comparison.p_value)


QUIET = {"color_jitter_prob": 0.0, "grayscale_prob": 0.0, "solarize_prob": 0.0}


@pytest.mark.parametrize(
    ("change", "quantity"),
    [({}, None), ({"horizontal_flip_prob": 0.2}, "flips"), ({"aspect_ratio": (1.0, 1.4)}, "aspect ratio")],
)
def test_regions_and_flips(change, quantity):
    plain = plain_pipeline(32, 32, colours=False)
    found = compare_geometry(plain, our_pipeline("fast", 32, 32, **QUIET, **change), draws=60)
    limit = SIGNIFICANCE / len(found)
    assert (worst(found).p_value < limit) == (quantity is not None)
    assert quantity in (None, worst(found).quantity)
    assert ("The pipelines agree" in agreement_table(found)[-1]) == (quantity is None)


@pytest.mark.slow
@pytest.mark.parametrize(("change", "differs"), [({}, False), ({"color_jitter": (0.0,) * 4}, True)])
def test_agreement(change, differs):
    found = agreement(60, **change)
    assert (worst(found).p_value < SIGNIFICANCE / len(found)) == differs


def test_tables_state_the_gain_within_rounds():
    slow, fast = Timing([0.2, 0.4, 0.2], [0.2, 0.5, 0.2]), Timing([0.1, 0.1, 0.05], [0.1, 0.1, 0.1])
    timings = {224: dict.fromkeys(("reference", "fast", "device, CPU part"), fast) | {PLAIN: slow}}
    assert f"| {PLAIN} | 5 | 5 | 1.00 (1.00 to 1.00) |" in rate_table(timings)
    assert "| fast | 10 | 10 | 4.00 (2.00 to 4.00) |" in rate_table(timings)
    assert "| 224 px | fast | 239 to 308 | 20 to 26 |" in core_table(timings)


def test_another_checkout_in_turn_with_this_one(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench_data, "TILE_SIZES", (224,))
    report = tmp_path / "report.json"
    options = ["--rounds", "1", "--images", "1", "--against", str(REPO), "--output", str(report)]
    main(get_args_parser().parse_args(options))
    (timings,) = json.loads(report.read_text())["pipelines"].values()
    assert list(timings) == ["the other checkout", *(f"here, {name}" for name in PIPELINES)]
    assert all(timing["cpu"][0] > 0 for timing in timings.values())
    assert "| here, fast |" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="holds no dinov2/data: name a checkout's folder"):
        main(get_args_parser().parse_args(["--against", str(tmp_path)]))


@pytest.mark.slow
def test_command_line(tmp_path, capsys):
    file = tmp_path / "report.json"
    options = ["--rounds", "1", "--images", "1", "--draws", "5", "--device", "cpu", "--output", str(file)]
    main(get_args_parser().parse_args(options))
    report = json.loads(file.read_text())
    assert report["pipelines"]["224"].keys() >= {*PIPELINES} and report["stages"].keys() == {"224", "512"}
    assert report["colours"]["cpu"]["eager"] > 0
    assert "flips" in [comparison["quantity"] for comparison in report["agreement"]]
    printed = capsys.readouterr().out
    for expected in ("| fast |", "| device, CPU part |", "| decoding alone |", "- eager:", "| flips |"):
        assert expected in printed
