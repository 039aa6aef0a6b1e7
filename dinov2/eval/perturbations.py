"""Controlled changes of stain and scanner, each at fixed strengths, that depend on seed and sample alone.

Sizes are in pixels of the image as it is stored, before the resize for the model.
"""

import io
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch.utils.data import Dataset

from dinov2.data.stains import adjust_stains

Change = Callable[[Image.Image, float, np.random.Generator], Image.Image]


def stain(image: Image.Image, strength: float, generator: np.random.Generator) -> Image.Image:
    """Multiply the amounts of haematoxylin, eosin and residual by ``1 + strength`` or ``1 - strength``.

    The sign is drawn per stain and image. Glass, which has no stain, stays as it is.
    """
    signs = torch.from_numpy(generator.choice([-1.0, 1.0], size=3))
    pixels = torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1)[None]
    changed = adjust_stains(pixels, 1 + strength * signs[None], torch.zeros(1, 3))
    return Image.fromarray(changed[0].permute(1, 2, 0).numpy().astype(np.uint8))


def gamma(image: Image.Image, strength: float, generator: np.random.Generator) -> Image.Image:
    """Raise the relative brightness to the power ``strength``: above 1 is darker."""
    table = (255 * (np.arange(256) / 255) ** strength).round().astype(np.uint8)
    return Image.fromarray(table[np.asarray(image)])


def brightness(image: Image.Image, strength: float, generator: np.random.Generator) -> Image.Image:
    """Multiply all channels by ``strength``."""
    return _scaled(image, (strength, strength, strength))


def warmth(image: Image.Image, strength: float, generator: np.random.Generator) -> Image.Image:
    """Multiply red by ``1 + strength`` and blue by ``1 - strength``: a warmer lamp, or a colder one."""
    return _scaled(image, (1 + strength, 1, 1 - strength))


def blur(image: Image.Image, strength: float, generator: np.random.Generator) -> Image.Image:
    """Blur with a Gaussian of the standard deviation ``strength`` in pixels: out of focus."""
    return image.filter(ImageFilter.GaussianBlur(strength))


def jpeg(image: Image.Image, strength: float, generator: np.random.Generator) -> Image.Image:
    """Compress with the JPEG quality ``strength``."""
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=int(strength))
    return Image.open(stream).convert("RGB")


def resolution(image: Image.Image, strength: float, generator: np.random.Generator) -> Image.Image:
    """Shrink by the factor ``strength`` and enlarge again: a scanner of fewer pixels per length."""
    size = [max(1, round(length / strength)) for length in image.size]
    return image.resize(size, Image.Resampling.BOX).resize(image.size, Image.Resampling.BICUBIC)


def _scaled(image: Image.Image, factors: tuple[float, float, float]) -> Image.Image:
    return Image.fromarray((np.asarray(image) * np.array(factors)).round().clip(0, 255).astype(np.uint8))


@dataclass(frozen=True)
class Perturbation:
    """One change at one strength; called with an image, it returns another one of the same size."""

    change: Change
    strength: float

    @property
    def kind(self) -> str:
        """The name of the change."""
        return self.change.__name__

    def __call__(self, image: Image.Image, seed: int, index: int) -> Image.Image:
        """Change an RGB image; ``seed`` and ``index`` decide what is drawn."""
        generator = np.random.default_rng([seed, zlib.crc32(self.kind.encode()), index])
        return self.change(image, self.strength, generator)


# In every kind from mild to strong; the middle is about what differs between laboratories and scanners.
PERTURBATIONS = tuple(
    Perturbation(change, strength)
    for change, strengths in (
        (stain, (0.1, 0.2, 0.4)),
        (gamma, (0.8, 1.25)),
        (brightness, (0.85, 1.15)),
        (warmth, (-0.1, 0.1)),
        (blur, (0.5, 1.0, 2.0)),
        (jpeg, (80, 50, 20)),
        (resolution, (1.5, 2.0, 4.0)),
    )
    for strength in strengths
)


class PerturbedDataset(Dataset):
    """Some samples of a dataset, changed before they are transformed.

    Args:
        dataset: Gives RGB images of PIL with a label or None.
        indices: The samples, in order.
        perturbation: None for the images as they are.
        transform: Of the changed image.
        seed: Of what is drawn; a sample's draw depends on its number in ``dataset``, not on who reads it.
    """

    def __init__(
        self,
        dataset: Dataset,
        indices: np.ndarray,
        perturbation: Perturbation | None,
        transform: Callable[[Image.Image], Any],
        seed: int = 0,
    ) -> None:
        self.dataset, self.indices, self.perturbation = dataset, indices, perturbation
        self.transform, self.seed = transform, seed

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[Any, Any]:
        index = int(self.indices[position])
        image, target = self.dataset[index]
        if self.perturbation is not None:
            image = self.perturbation(image, self.seed, index)
        return self.transform(image), target
