"""Colour maps of patch tokens: the first three principal components as red, green and blue.

One basis is fitted to the tokens of all images, and of both models where two are compared, so that colours
mean the same everywhere in a sheet. Letters: n images, (h, w) patches, D width, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dinov2.errors import ConfigError
from dinov2.eval.pictures.canvas import Cell, sheet
from dinov2.eval.utils import autocast_context, device_of

COMPONENTS = 3
RANGE_PERCENT = (1, 99)
SIDE = 224


@dataclass(frozen=True)
class Basis:
    """Three directions in token space, and the values that are spread over the colour scale.

    Args:
        directions: (D, 3); of each column the entry of the largest magnitude is positive.
        low, high: (3,), the projections shown as 0 and as 1.
        shares: (3,), of the variance, 0..1.
    """

    directions: np.ndarray
    low: np.ndarray
    high: np.ndarray
    shares: np.ndarray


def standardised(tokens: np.ndarray) -> np.ndarray:
    """Return tokens (..., D) of one model with mean zero and a mean squared length of one, float64.

    So no model outweighs another in a common basis. Tokens that are all the same become zeros.
    """
    centred = tokens.astype(np.float64)
    centred -= centred.reshape(-1, tokens.shape[-1]).mean(axis=0)
    spread = np.sqrt((centred**2).sum(axis=-1).mean())
    return centred / (spread if spread > 0 else 1.0)


def fit_basis(parts: Sequence[np.ndarray], percent: tuple[float, float] = RANGE_PERCENT) -> Basis:
    """Fit one basis to standardised tokens (T, D), a part per model."""
    tokens = np.concatenate([part.reshape(-1, part.shape[-1]) for part in parts])
    variances, vectors = np.linalg.eigh(tokens.T @ tokens)
    variances, directions = variances[::-1].clip(min=0), vectors[:, ::-1][:, :COMPONENTS]
    strongest = np.abs(directions).argmax(axis=0)
    directions = directions * np.sign(directions[strongest, range(COMPONENTS)])
    low, high = np.percentile(tokens @ directions, percent, axis=0)
    return Basis(directions, low, high, variances[:COMPONENTS] / max(variances.sum(), 1e-300))


def colours(tokens: np.ndarray, basis: Basis) -> np.ndarray:
    """Return the colours (..., 3) uint8 of standardised tokens (..., D)."""
    spread = np.where(basis.high > basis.low, basis.high - basis.low, 1.0)
    values = (tokens @ basis.directions - basis.low) / spread
    return (values.clip(0, 1) * 255).round().astype(np.uint8)


@torch.inference_mode()
def token_maps(model: nn.Module, images: Tensor, autocast_dtype: torch.dtype = torch.float32) -> np.ndarray:
    """Return the patch tokens after the final norm (n, h, w, D), without cls token and registers.

    Args:
        images: Normalised, (n, 3, H, W).
    """
    device, maps = device_of(model), []
    for image in images:
        with autocast_context(device, autocast_dtype):
            (tokens,) = model.get_intermediate_layers(image[None].to(device), 1, reshape=True)
        maps.append(tokens[0].float().permute(1, 2, 0).cpu().numpy())
    return np.stack(maps)


def pca_sheet(
    pictures: Sequence[Image.Image], maps: np.ndarray, baseline: np.ndarray | None = None
) -> tuple[Image.Image, list[dict]]:
    """Draw images and their colour maps below, those of a baseline between them.

    Args:
        pictures: Of n images.
        maps: Their tokens (n, h, w, D).
        baseline: The tokens of another model of the same width.

    Returns:
        The sheet, and a row of numbers per component.

    Raises:
        ConfigError: The baseline has another width or another patch grid.
    """
    parts = [standardised(maps)]
    if baseline is not None:
        if baseline.shape != maps.shape:
            raise ConfigError(
                f"the baseline gives {baseline.shape[1]} x {baseline.shape[2]} patches of width "
                f"{baseline.shape[3]}, the model {maps.shape[1]} x {maps.shape[2]} of width {maps.shape[3]}, "
                "which cannot share a basis: give --baseline-weights of the same architecture"
            )
        parts.insert(0, standardised(baseline))
    basis = fit_basis(parts)
    names = ["image", "before", "after"] if baseline is not None else ["image", "PCA of patch tokens"]
    rows = [[Cell(picture) for picture in pictures]]
    for part in parts:
        drawn = [Image.fromarray(colours(tokens, basis)) for tokens in part]
        rows.append([Cell(one.resize((SIDE, SIDE), Image.Resampling.NEAREST)) for one in drawn])
    numbers = [
        {"component": c + 1, "variance_share": basis.shares[c], "low": basis.low[c], "high": basis.high[c]}
        for c in range(COMPONENTS)
    ]
    return sheet(rows, SIDE, "Principal components 1, 2, 3 as red, green, blue", names), numbers
