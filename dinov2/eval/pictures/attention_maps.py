"""Where the cls token of the last block looks: its attention over the patches, per head.

Fused attention returns no weights, so they are computed again from queries and keys. Letters: n images,
H heads, (h, w) patches, R registers, N tokens, E width of a head.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dinov2.errors import ConfigError
from dinov2.eval.pictures.canvas import Cell, heat, sheet
from dinov2.eval.utils import autocast_context, device_of
from dinov2.layers.attention import Attention

SIDE = 160
OVERLAY = 0.5
BRIGHTEST_PERCENT = 99


@torch.inference_mode()
def cls_attention(model: nn.Module, images: Tensor, autocast_dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the attention of the cls token in the last block, float32.

    Args:
        model: A vision transformer of this project.
        images: Normalised, (n, 3, H, W).

    Returns:
        (n, H, N): softmax over all N tokens, ordered cls, registers, patches; sums to one.

    Raises:
        ConfigError: The model has no attention of this project.
    """
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    if not layers:
        raise ConfigError(
            f"{type(model).__name__} has no attention layers that can be read: attention maps need a vision "
            "transformer of this project"
        )
    attention, device, found = layers[-1], device_of(model), []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.append(inputs[0])

    handle = attention.register_forward_pre_hook(keep)
    weights = []
    try:
        for image in images:
            with autocast_context(device, autocast_dtype):
                model(image[None].to(device))
                qkv = attention.qkv(found.pop())
            q, k, _ = qkv.float().unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
            products = q[:, :, :1] @ k.transpose(-2, -1)  # [1, H, 1, N]
            weights.append((products * q.shape[-1] ** -0.5).softmax(dim=-1)[:, :, 0].cpu())
    finally:
        handle.remove()
    return torch.cat(weights)


def attention_sheet(
    pictures: Sequence[Image.Image], weights: Tensor, grid: tuple[int, int], names: Sequence[str]
) -> tuple[Image.Image, list[dict]]:
    """Draw images with the attention laid over them: the mean of the heads, then every head.

    Args:
        pictures: Of n images.
        weights: (n, H, N) of :func:`cls_attention`.
        grid: (h, w); what stands before these h * w tokens is the cls token and the registers.
        names: Of the images.

    Returns:
        The sheet, and a row of numbers per image and head: the shares of the attention that go to the cls
        token, the registers and the patches, and on how many patches the last spreads (exp of the entropy).
    """
    height, width = grid
    first = weights.shape[-1] - height * width
    rows, numbers = [], []
    for picture, name, heads in zip(pictures, names, weights, strict=True):
        picture = picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        maps = [("mean of heads", heads.mean(dim=0))]
        maps += [(f"head {number}", head) for number, head in enumerate(heads, 1)]
        cells = [Cell(picture, ["image"])]
        for head, values in maps:
            patches = values[first:]
            share = patches.double() / patches.double().sum()
            spread = float((-(share * share.clamp(min=1e-300).log()).sum()).exp())
            numbers.append(
                {
                    "image": name,
                    "head": head,
                    "share_cls": float(values[0]),
                    "share_registers": float(values[1:first].sum()),
                    "share_patches": float(patches.sum()),
                    "effective_patches": spread,
                }
            )
            drawn = _overlay(picture, patches.reshape(height, width).numpy())
            cells.append(Cell(drawn, [head, f"spread {spread:.0f} of {len(patches)}"]))
        rows.append(cells)
    return sheet(rows, SIDE, "Attention of the cls token in the last block", names), numbers


def _overlay(picture: Image.Image, values: np.ndarray) -> Image.Image:
    brightest = np.percentile(values, BRIGHTEST_PERCENT)
    drawn = Image.fromarray(heat((values / max(brightest, 1e-12)).clip(0, 1)))
    drawn = drawn.resize(picture.size, Image.Resampling.BILINEAR)
    return Image.blend(picture.convert("L").convert("RGB"), drawn, OVERLAY)
