"""Turns windows into feature vectors: by a backbone, by an untrained backbone, by a histogram."""

from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from dinov2.data.transforms import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from dinov2.models import build_model_from_cfg
from dinov2.models.pretrained import load_backbone

HISTOGRAM_BINS = 16


def load_model(cfg: DictConfig, weights: Path | str, *, entry: str | None = None) -> nn.Module:
    """Build the backbone that ``cfg.student`` describes and load ``weights`` into it, ready for evaluation.

    Args:
        cfg: A resolved training config.
        weights: Anything :func:`dinov2.models.pretrained.load_backbone` reads.
        entry: Which entry of a training export to take, for example ``teacher``.
    """
    model, _ = build_model_from_cfg(cfg, only_teacher=True)
    load_backbone(model, str(weights), entry=entry)
    return model.eval()


def random_model(cfg: DictConfig, seed: int) -> nn.Module:
    """Build the same architecture with random weights, as a baseline.

    LayerScale starts at 1: at the training value of 1e-5 the blocks of an untrained network would do nothing,
    and the baseline would be weaker than a random network can be.
    """
    cfg = OmegaConf.merge(cfg, {"student": {"layerscale": 1.0}})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, _ = build_model_from_cfg(cfg, only_teacher=True)
    return model.eval()


def to_batch(pixels: np.ndarray) -> Tensor:
    """Normalise pictures as in training: (n, H, W, 3) uint8 to (n, 3, H, W) float32."""
    batch = torch.tensor(pixels).permute(0, 3, 1, 2).float() / 255
    mean = torch.tensor(IMAGENET_DEFAULT_MEAN).view(1, 3, 1, 1)
    std = torch.tensor(IMAGENET_DEFAULT_STD).view(1, 3, 1, 1)
    return (batch - mean) / std


@torch.inference_mode()
def backbone_features(
    model: nn.Module, pixels: np.ndarray, *, device: torch.device, batch_size: int = 16
) -> Tensor:
    """Return cls token and mean patch token of (n, H, W, 3) uint8 windows: (n, 2 D) float32 on the CPU."""
    model.to(device)
    rows = []
    for start in range(0, len(pixels), batch_size):
        batch = to_batch(pixels[start : start + batch_size]).to(device)
        tokens = model(batch, is_training=True)
        rows.append(torch.cat([tokens["x_norm_clstoken"], tokens["x_norm_patchtokens"].mean(dim=1)], dim=1))
    return torch.cat(rows).float().cpu()


def histogram_features(pixels: np.ndarray, *, bins: int = HISTOGRAM_BINS) -> Tensor:
    """Return the share of pixels per brightness bin and channel: (n, 3 bins); for grey (n, bins)."""
    channels = 1 if (pixels[..., :1] == pixels).all() else 3
    rows = [
        np.concatenate([np.histogram(window[..., c], bins=bins, range=(0, 256))[0] for c in range(channels)])
        for window in pixels
    ]
    return torch.from_numpy(np.stack(rows) / pixels[0, ..., 0].size).float()
