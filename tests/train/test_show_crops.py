"""The sheet of crops comes out of the trainer's own pipeline."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2.data.device_crops import finish_batch
from dinov2.errors import ConfigError, OutputError
from dinov2.train import get_args_parser, main
from dinov2.train.arguments import check_command_line, get_show_crops_parser
from dinov2.train.input import build_data_loader, build_dataset
from dinov2.train.show_crops import GAP, HEADING, LARGE, MASK_COLOUR, SMALL, draw_sheet
from dinov2.train.show_crops import main as show_main
from tests.conftest import REPO


def place(row, column):
    """The pixels of a large picture."""
    top, left = HEADING + row * (LARGE + GAP), GAP + column * (LARGE + GAP)
    return slice(top, top + LARGE), slice(left, left + LARGE)


def local_place(number, columns):
    line, column = divmod(number, columns)
    top, left = HEADING + line * (SMALL + GAP), GAP + 3 * (LARGE + GAP) + column * (SMALL + GAP)
    return slice(top, top + SMALL), slice(left, left + SMALL)


@pytest.mark.parametrize("pipeline", ["reference", "device"])
def test_crops_are_those_of_the_first_batch(tiny, pipeline):
    """Without masks, which are drawn per batch."""
    cfg = tiny.resolve(f"crops.pipeline={pipeline}", "ibot.mask_sample_probability=0", "train.seed=5")
    sheet = np.asarray(draw_sheet(cfg, num_tiles=2))
    images = next(iter(build_data_loader(cfg, build_dataset(cfg), 0)))
    images = finish_batch(images, torch.device("cpu"), torch.float32)
    mean, std = (torch.tensor(tuple(cfg.crops[name])).view(3, 1, 1) for name in ("mean", "std"))

    def drawn(crop, side):
        pixels = ((crop * std + mean) * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
        return np.asarray(Image.fromarray(pixels).resize((side, side)))

    batch_size = cfg.train.batch_size_per_gpu
    for row in range(2):
        for view in range(2):
            crop = images["collated_global_crops"][view * batch_size + row]
            assert np.array_equal(sheet[place(row, 1 + view)], drawn(crop, LARGE))
    for number in range(2):
        crop = images["collated_local_crops"][number * batch_size]
        assert np.array_equal(sheet[local_place(number, columns=1)], drawn(crop, SMALL))


def test_masks_are_yellow(tiny):
    cfg = tiny.resolve("ibot.mask_sample_probability=1.0", "ibot.mask_ratio_min_max=[0.3,0.6]")
    sheet = np.asarray(draw_sheet(cfg, num_tiles=2), int)
    # A masked pixel is four fifths yellow; tissue has no blue that low beside so much red and green.
    masked = (sheet[..., 2] < 60) & (sheet[..., 0] > 200) & (sheet[..., 1] > 150)
    for row in range(2):
        tile, first, second = (masked[place(row, column)].mean() for column in range(3))
        assert tile < 0.01 and first > 0.05 and second > 0.05
    assert tuple(MASK_COLOUR) == (255, 196, 0)


def test_seed_and_iteration_decide(tiny):
    cfg, other = tiny.resolve(), tiny.resolve("train.seed=1")
    first, again, later, seeded = (
        np.asarray(draw_sheet(one, num_tiles=1, first=iteration))
        for one, iteration in ((cfg, 0), (cfg, 0), (cfg, 3), (other, 0))
    )
    assert (first == again).all()
    assert (first != later).any() and (first != seeded).any()


def test_without_local_crops(tiny):
    cfg = tiny.resolve("crops.local_crops_number=0")
    assert draw_sheet(cfg, num_tiles=1).width == GAP + 3 * (LARGE + GAP)


def test_both_command_lines_write_the_same_picture(tiny, tmp_path, capsys):
    words = ["--config-file", str(tiny.config)]
    override = f"train.dataset_path={tiny.dataset}"
    show = [*words, "--output", str(tmp_path / "a.png"), override]
    check_command_line(show, get_show_crops_parser())
    show_main(get_show_crops_parser().parse_args(show))
    main(get_args_parser().parse_args([*words, "--show-crops", str(tmp_path / "b.png"), override]))
    assert "4 tiles and their crops" in capsys.readouterr().out
    first, second = (np.asarray(Image.open(tmp_path / name)) for name in ("a.png", "b.png"))
    assert (first == second).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a.png",
        "b.png",
        "tiny.yaml",
    ]  # no run was begun


@pytest.mark.parametrize(
    ("option", "error", "text"),
    [
        (["--tiles", "0"], ConfigError, "--tiles is 0"),
        (["--output", "crops.doc"], ConfigError, "'crops.doc'; let its name end in .png"),
        (["--output", "nowhere/crops.png"], OutputError, "nowhere/crops.png cannot be written"),
    ],
)
def test_refused(tiny, option, error, text):
    words = ["--config-file", str(tiny.config), *option, f"train.dataset_path={tiny.dataset}"]
    with pytest.raises(error, match=text):
        show_main(get_show_crops_parser().parse_args(words))


def test_a_wrong_config_is_refused_before_torch_is_loaded(tmp_path):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "dinov2.train.show_crops", "crops.pipeline=quick"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPO)},
    )
    assert done.returncode == 1
    assert "error: crops.pipeline (command line) is the string 'quick'" in done.stderr
    assert re.search(r"\| +omegaconf$", done.stderr, re.MULTILINE)
    assert not re.search(r"\| +torch$", done.stderr, re.MULTILINE)
