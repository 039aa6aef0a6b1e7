"""The benchmark's yardstick, its statistics, and its tables."""

import pytest
import torch

from scripts.bench_data import (
    PLAIN,
    SIGNIFICANCE,
    Timing,
    agreement,
    agreement_table,
    core_table,
    decode,
    get_args_parser,
    main,
    make_files,
    our_pipeline,
    plain_pipeline,
    rate_table,
)


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


def test_agreement():
    found = agreement(40)
    assert worst(found).p_value > SIGNIFICANCE / len(found)
    assert "The pipelines agree" in agreement_table(found)[-1]


@pytest.mark.parametrize(
    ("change", "quantity"),
    [
        ({"horizontal_flip_prob": 0.2}, "flips"),
        ({"aspect_ratio": (1.0, 1.4)}, "aspect ratio"),
        ({"color_jitter": (0.0, 0.0, 0.0, 0.0)}, None),
    ],
)
def test_a_deviation_is_found(change, quantity):
    found = agreement(60, **change)
    assert worst(found).p_value < SIGNIFICANCE / len(found)
    assert quantity in (None, worst(found).quantity)
    assert worst(found).quantity in agreement_table(found)[-1].partition("differ in: ")[2]


def test_tables_state_the_gain_within_rounds():
    slow, fast = Timing([0.2, 0.4, 0.2], [0.2, 0.5, 0.2]), Timing([0.1, 0.1, 0.05], [0.1, 0.1, 0.1])
    timings = {224: dict.fromkeys(("reference", "fast", "device, CPU part"), fast) | {PLAIN: slow}}
    assert f"| {PLAIN} | 5 | 5 | 1.00 (1.00 to 1.00) |" in rate_table(timings)
    assert "| fast | 10 | 10 | 4.00 (2.00 to 4.00) |" in rate_table(timings)
    assert "| 224 px | fast | 239 to 308 | 20 to 26 |" in core_table(timings)


def test_command_line(capsys):
    main(get_args_parser().parse_args(["--rounds", "1", "--images", "1", "--draws", "5", "--device", "cpu"]))
    printed = capsys.readouterr().out
    for expected in ("| fast |", "| device, CPU part |", "| decoding alone |", "- eager:", "| flips |"):
        assert expected in printed
