"""Names, addresses and small modules that the released models share."""

import itertools
import math

import torch.nn.functional as F
from torch import Tensor, nn

_DINOV2_BASE_URL = "https://dl.fbaipublicfiles.com/dinov2"


def _make_dinov2_model_name(arch_name: str, patch_size: int, num_register_tokens: int = 0) -> str:
    """Return the released name of an architecture, such as ``dinov2_vits14_reg4`` for ``vit_small``."""
    registers = f"_reg{num_register_tokens}" if num_register_tokens else ""
    size = arch_name.removeprefix("vit_")[0]
    return f"dinov2_vit{size}{patch_size}{registers}"


def release_url(arch_name: str, patch_size: int, num_register_tokens: int, suffix: str) -> str:
    """Return the address of a released file; the folder carries no register suffix, the file does."""
    folder = _make_dinov2_model_name(arch_name, patch_size)
    file = _make_dinov2_model_name(arch_name, patch_size, num_register_tokens)
    return f"{_DINOV2_BASE_URL}/{folder}/{file}_{suffix}.pth"


class CenterPadding(nn.Module):
    """Pad images evenly on both sides, so that height and width become multiples of ``multiple``."""

    def __init__(self, multiple: int) -> None:
        super().__init__()
        self.multiple = multiple

    def forward(self, x: Tensor) -> Tensor:
        """Pad ``[..., H, W]`` with zeros; an odd pixel goes to the right or to the bottom."""
        # F.pad counts from the last axis.
        return F.pad(x, list(itertools.chain.from_iterable(self._margins(size) for size in x.shape[:-3:-1])))

    def _margins(self, size: int) -> tuple[int, int]:
        missing = math.ceil(size / self.multiple) * self.multiple - size
        return missing // 2, missing - missing // 2
