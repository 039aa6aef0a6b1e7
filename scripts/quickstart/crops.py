"""A sheet of the crops that the trainer is really fed, with the masked patches marked."""

import numpy as np
import torch
from omegaconf import DictConfig
from PIL import Image, ImageDraw
from torch import Tensor

from dinov2.data.datasets.decoders import ImageDataDecoder
from dinov2.data.transforms import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from dinov2.train.input import build_collate, build_dataset
from dinov2.utils.seeding import seed_everything

MASK_COLOUR = np.array([255, 196, 0], np.float32)
MASK_OPACITY = 0.8
PAPER = (255, 255, 255)
INK = (40, 40, 40)

# Pixels in the drawing: tiles and global crops; half as much, less the gap, for local crops.
LARGE = 224
GAP = 8
SMALL = (LARGE - GAP) // 2
HEADING = 18


def draw_sheet(cfg: DictConfig, *, num_tiles: int = 4, seed: int = 0) -> Image.Image:
    """Draw one row per tile: the tile, its two global crops with their masks, its local crops.

    Tiles are evenly spaced in the dataset; augmentation, masks and collate are those of the trainer. Crops of
    other sizes are enlarged or shrunk to fit the sheet.

    Args:
        cfg: The resolved training config.
        num_tiles: Rows.
        seed: Of the augmentation and the masks.
    """
    dataset = build_dataset(cfg)
    indices = [int(i) for i in np.linspace(0, len(dataset) - 1, num_tiles + 2).round()[1:-1]]
    seed_everything(seed)
    batch = build_collate(cfg)([dataset[index] for index in indices])

    tiles = [ImageDataDecoder(dataset.get_image_data(index)).decode() for index in indices]
    masks = batch["collated_masks"].numpy()
    global_crops = [
        _mark(crop, mask, cfg.student.patch_size)
        for crop, mask in zip(_to_pixels(batch["collated_global_crops"]), masks, strict=True)
    ]
    local_crops = _to_pixels(batch["collated_local_crops"]) if cfg.crops.local_crops_number else []
    # Crops are crop-major: the first crop of every tile, then the second crop of every tile, and so on.
    large = [[tiles[row], *map(Image.fromarray, global_crops[row::num_tiles])] for row in range(num_tiles)]
    small = [list(map(Image.fromarray, local_crops[row::num_tiles])) for row in range(num_tiles)]
    return _lay_out(large, small)


def _to_pixels(crops: Tensor) -> np.ndarray:
    """Undo the normalisation: (n, 3, H, W) float to (n, H, W, 3) uint8."""
    mean = torch.tensor(IMAGENET_DEFAULT_MEAN).view(3, 1, 1)
    std = torch.tensor(IMAGENET_DEFAULT_STD).view(3, 1, 1)
    pixels = ((crops.float() * std + mean) * 255).round().clamp(0, 255).byte()
    return pixels.permute(0, 2, 3, 1).numpy()


def _mark(crop: np.ndarray, mask: np.ndarray, patch: int) -> np.ndarray:
    """Cover the masked patches of a (H, W, 3) uint8 crop; ``mask`` is (N,) bool, row-major."""
    side = crop.shape[0] // patch
    covered = np.kron(mask.reshape(side, side), np.ones((patch, patch), bool))[..., None]
    blended = (1 - MASK_OPACITY) * crop + MASK_OPACITY * MASK_COLOUR
    return np.where(covered, blended, crop).round().astype(np.uint8)


def _lay_out(large: list[list[Image.Image]], small: list[list[Image.Image]]) -> Image.Image:
    """Put each row's large pictures side by side and its small ones in two lines to their right."""
    columns = -(-len(small[0]) // 2)
    first_small = GAP + len(large[0]) * (LARGE + GAP)
    width = first_small + columns * (SMALL + GAP)
    sheet = Image.new("RGB", (width, HEADING + len(large) * (LARGE + GAP) + GAP), PAPER)

    headings = ["tile", "global crop 1, masked: yellow", "global crop 2, masked: yellow"]
    draw = ImageDraw.Draw(sheet)
    for column, heading in enumerate([*headings, "local crops"] if columns else headings):
        draw.text((GAP + column * (LARGE + GAP), 4), heading, fill=INK)
    for row, (large_row, small_row) in enumerate(zip(large, small, strict=True)):
        top = HEADING + row * (LARGE + GAP)
        for column, picture in enumerate(large_row):
            sheet.paste(picture.resize((LARGE, LARGE)), (GAP + column * (LARGE + GAP), top))
        for place, picture in enumerate(small_row):
            line, column = divmod(place, columns)
            corner = (first_small + column * (SMALL + GAP), top + line * (SMALL + GAP))
            sheet.paste(picture.resize((SMALL, SMALL)), corner)
    return sheet
