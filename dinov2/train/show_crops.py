"""A contact sheet of the crops that the trainer is really fed, with the masked patches marked.

    python -m dinov2.train.show_crops --config-file FILE --output crops.png train.dataset_path=...

Takes any training config and its overrides. The same picture comes from
``python dinov2/train/train.py --show-crops crops.png ...``.
"""

import sys

if __name__ == "__main__":
    # As for the trainer itself: a wrong config is reported before torch is loaded.
    from dinov2 import cli
    from dinov2.train.arguments import check_command_line, get_show_crops_parser

    cli.run(check_command_line, sys.argv[1:], get_show_crops_parser())

import argparse
import textwrap
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from PIL import Image, ImageDraw
from torch import Tensor

from dinov2 import cli
from dinov2.data import DataAugmentationDINO
from dinov2.data.device_crops import finish_batch
from dinov2.errors import ConfigError, OutputError
from dinov2.train.arguments import get_show_crops_parser
from dinov2.train.initialization import settle_config
from dinov2.train.input import (
    ReproducibleSamples,
    build_augmentation,
    build_collate,
    build_dataset,
    build_sampler,
)
from dinov2.utils.config import get_cfg_from_args

MASK_COLOUR = np.array([255, 196, 0], np.float32)
MASK_OPACITY = 0.8
PAPER = (255, 255, 255)
INK = (40, 40, 40)
FRAME = (200, 200, 200)

# Pixels in the drawing: tiles and global crops; half as much, less the gap, for local crops.
LARGE = 224
GAP = 8
SMALL = (LARGE - GAP) // 2
LINE = 14  # of text
HEADING = LINE + 4
LETTER = 6  # mean width


def show_crops(args: argparse.Namespace, path: Path, *, num_tiles: int = 4, first: int = 0) -> None:
    """Write the sheet of the config that parsed arguments name (``config_file``, ``opts``).

    Args:
        args: of the trainer or of this module.
        path: of the picture; its suffix chooses the format.
        num_tiles: rows.
        first: iteration whose batch begins with these tiles.

    Raises:
        ConfigError: the config is wrong, a number out of range, or no picture format has the suffix.
        OutputError: the file cannot be written.
    """
    for option, value, least in (("--tiles", num_tiles, 1), ("--iteration", first, 0)):
        if value < least:
            raise ConfigError(f"{option} is {value}; use at least {least}")
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise ConfigError(f"no picture can be written as {path.name!r}; let its name end in .png")
    cfg = get_cfg_from_args(args)
    settle_config(cfg)
    sheet = draw_sheet(cfg, num_tiles=num_tiles, first=first)
    try:
        sheet.save(path)
    except OSError as error:
        raise OutputError(f"the picture {path} cannot be written ({error.strerror or error})") from error
    cli.say(f"{num_tiles} tiles and their crops: {path}")


class _Recorder:
    """Augments, and keeps what it was given."""

    def __init__(self, augmentation: DataAugmentationDINO) -> None:
        self.augmentation = augmentation
        self.last: Image.Image | None = None

    def __call__(self, image: Image.Image) -> dict[str, Any]:
        self.last = image
        return self.augmentation(image)


def draw_sheet(cfg: DictConfig, *, num_tiles: int = 4, first: int = 0) -> Image.Image:
    """Draw one row per tile: the tile, its two global crops with their masks, its local crops.

    Tiles, augmentation and seed are those of the trainer: the crops are those with which a run in one process
    begins iteration ``first``; of several processes each is dealt other tiles. The masks are drawn for these
    tiles alone, so they differ from the ones of the batch. Crops of other sizes are enlarged or shrunk to fit
    the sheet.

    Args:
        cfg: resolved training config.
        num_tiles: rows.
        first: zero-based iteration.
    """
    recorder = _Recorder(build_augmentation(cfg))
    dataset = build_dataset(cfg, augmentation=recorder)
    stream = ReproducibleSamples(dataset, cfg.train.seed, rank=0)
    samples, tiles = [], []
    for key in islice(build_sampler(cfg, dataset, first), num_tiles):
        samples.append(stream[key])
        tiles.append(recorder.last)
    batch = finish_batch(build_collate(cfg)(samples), torch.device("cpu"), torch.float32)

    constants = recorder.augmentation.normalisation
    masks = batch["collated_masks"].numpy()
    global_crops = [
        _mark(crop, mask, cfg.student.patch_size)
        for crop, mask in zip(_to_pixels(batch["collated_global_crops"], constants), masks, strict=True)
    ]
    local_crops = _to_pixels(batch["collated_local_crops"], constants) if cfg.crops.local_crops_number else []
    # Crops are crop-major: the first crop of every tile, then the second crop of every tile, and so on.
    large = [[tiles[row], *map(Image.fromarray, global_crops[row::num_tiles])] for row in range(num_tiles)]
    small = [list(map(Image.fromarray, local_crops[row::num_tiles])) for row in range(num_tiles)]
    width, height = tiles[0].size
    size = cfg.crops.global_crops_size
    headings = [f"tile, {width} x {height} px"]
    headings += [f"global crop {number}, {size} px, masked: yellow" for number in (1, 2)]
    headings += [f"local crops, {cfg.crops.local_crops_size} px"] if small[0] else []
    return _lay_out(large, small, headings, recorder.augmentation.describe())


def _to_pixels(crops: Tensor, constants: Tensor) -> np.ndarray:
    """Undo the normalisation: (n, 3, H, W) float to (n, H, W, 3) uint8."""
    mean, std = constants.view(2, 3, 1, 1)
    pixels = ((crops.float() * std + mean) * 255).round().clamp(0, 255).byte()
    return pixels.permute(0, 2, 3, 1).numpy()


def _mark(crop: np.ndarray, mask: np.ndarray, patch: int) -> np.ndarray:
    """Cover the masked patches of a (H, W, 3) uint8 crop; ``mask`` is (N,) bool, row-major."""
    side = crop.shape[0] // patch
    covered = np.kron(mask.reshape(side, side), np.ones((patch, patch), bool))[..., None]
    blended = (1 - MASK_OPACITY) * crop + MASK_OPACITY * MASK_COLOUR
    return np.where(covered, blended, crop).round().astype(np.uint8)


def _lay_out(
    large: list[list[Image.Image]], small: list[list[Image.Image]], headings: list[str], caption: str
) -> Image.Image:
    """Put each row's large pictures side by side and its small ones in two lines to their right."""
    columns = -(-len(small[0]) // 2)
    first_small = GAP + len(large[0]) * (LARGE + GAP)
    width = first_small + columns * (SMALL + GAP)
    lines = textwrap.wrap(caption, (width - 2 * GAP) // LETTER)
    below = HEADING + len(large) * (LARGE + GAP)
    sheet = Image.new("RGB", (width, below + len(lines) * LINE + GAP), PAPER)

    draw = ImageDraw.Draw(sheet)
    for column, heading in enumerate(headings):
        draw.text((GAP + column * (LARGE + GAP), 4), heading, fill=INK)
    for number, line in enumerate(lines):
        draw.text((GAP, below + number * LINE), line, fill=INK)
    for row, (large_row, small_row) in enumerate(zip(large, small, strict=True)):
        top = HEADING + row * (LARGE + GAP)
        for column, picture in enumerate(large_row):
            _put(sheet, picture, LARGE, (GAP + column * (LARGE + GAP), top))
        for place, picture in enumerate(small_row):
            line, column = divmod(place, columns)
            _put(sheet, picture, SMALL, (first_small + column * (SMALL + GAP), top + line * (SMALL + GAP)))
    return sheet


def _put(sheet: Image.Image, picture: Image.Image, side: int, corner: tuple[int, int]) -> None:
    """Paste a picture with a thin frame round it, for crops as white as the paper."""
    left, top = corner
    ImageDraw.Draw(sheet).rectangle((left - 1, top - 1, left + side, top + side), outline=FRAME)
    sheet.paste(picture.resize((side, side)), corner)


def main(args: argparse.Namespace) -> None:
    """Write the sheet that the parsed command line asks for."""
    args.output_dir = ""
    show_crops(args, Path(args.output), num_tiles=args.tiles, first=args.iteration)


if __name__ == "__main__":
    cli.run(main, get_show_crops_parser().parse_args())
