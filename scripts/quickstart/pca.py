"""PCA colour maps of the patch tokens over a whole picture, with one basis so that two models compare."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import nn

from scripts.quickstart.features import to_batch
from scripts.quickstart.tiles import tissue_mask

PATCH_PIXELS = 14
# At half resolution the shipped slide is 105 x 79 patches: one forward pass, without seams between windows.
SHRINK = 2
MIN_TISSUE_PER_PATCH = 0.3

# See-through grey: the slide's outline shows on light and on dark paper.
GLASS = (128, 128, 128, 40)


@dataclass(frozen=True)
class Basis:
    """Three directions in token space and the range of values that is spread over the colour scale.

    Attributes:
        directions: (D, 3); of each column the entry with the largest magnitude is positive.
        low: (3,) projection shown as 0.
        high: (3,) projection shown as 1.
    """

    directions: np.ndarray
    low: np.ndarray
    high: np.ndarray


def shrink(picture: Image.Image) -> np.ndarray:
    """Halve a picture and cut it to whole patches: (h * 14, w * 14, 3) uint8."""
    step = SHRINK * PATCH_PIXELS
    width, height = picture.width // step * step, picture.height // step * step
    whole = picture.crop((0, 0, width, height))
    return np.asarray(whole.resize((width // SHRINK, height // SHRINK), Image.Resampling.LANCZOS))


def patch_tissue(picture: np.ndarray) -> np.ndarray:
    """Say which patches of a (h * 14, w * 14, 3) uint8 picture show tissue: (h, w) bool."""
    height, width = (length // PATCH_PIXELS for length in picture.shape[:2])
    share = tissue_mask(picture).reshape(height, PATCH_PIXELS, width, PATCH_PIXELS).mean(axis=(1, 3))
    return share >= MIN_TISSUE_PER_PATCH


@torch.inference_mode()
def token_map(model: nn.Module, picture: np.ndarray, *, device: torch.device) -> np.ndarray:
    """Return the patch tokens over a (h * 14, w * 14, 3) uint8 picture: (h, w, D) float32."""
    height, width = (length // PATCH_PIXELS for length in picture.shape[:2])
    tokens = model.to(device)(to_batch(picture[None]).to(device), is_training=True)["x_norm_patchtokens"]
    return tokens[0].float().cpu().unflatten(0, (height, width)).numpy()


def fit_basis(maps: list[np.ndarray], tissue: np.ndarray) -> Basis:
    """Fit one basis to the tissue tokens of several models, each brought to mean zero and equal variance.

    Args:
        maps: One (h, w, D) token map per model.
        tissue: (h, w) bool; other tokens do not count.
    """
    tokens = np.concatenate([_standardised(tokens, tissue)[tissue] for tokens in maps])
    directions = np.linalg.eigh(tokens.T @ tokens)[1][:, ::-1][:, :3]
    strongest = np.abs(directions).argmax(axis=0)
    directions = directions * np.sign(directions[strongest, range(3)])
    low, high = np.percentile(tokens @ directions, [2, 98], axis=0)
    return Basis(directions, low, high)


def colour_map(tokens: np.ndarray, tissue: np.ndarray, basis: Basis, *, scale: int = 6) -> Image.Image:
    """Draw a (h, w, D) token map: red, green and blue are the first three components, glass is see-through.

    Args:
        tokens: The map of :func:`token_map`.
        tissue: (h, w) bool.
        basis: From :func:`fit_basis`.
        scale: Pixels per patch in the drawing.

    Returns:
        RGBA picture of (scale * w, scale * h) pixels.
    """
    values = _standardised(tokens, tissue) @ basis.directions
    values = ((values - basis.low) / (basis.high - basis.low)).clip(0, 1)
    rgba = np.full((*tissue.shape, 4), GLASS, np.uint8)
    rgba[tissue, :3] = (values[tissue] * 255).round()
    rgba[tissue, 3] = 255
    height, width = tissue.shape
    return Image.fromarray(rgba, "RGBA").resize((width * scale, height * scale), Image.Resampling.NEAREST)


def _standardised(tokens: np.ndarray, tissue: np.ndarray) -> np.ndarray:
    """Centre on the tissue and divide by its total spread, so that no model outweighs another."""
    centred = tokens.astype(np.float64) - tokens[tissue].mean(axis=0, dtype=np.float64)
    return centred / np.sqrt((centred[tissue] ** 2).sum(axis=1).mean())
