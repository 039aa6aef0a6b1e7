"""Image to patch tokens."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2.errors import ConfigError


def make_2tuple(x: int | tuple[int, int]) -> tuple[int, int]:
    """Return ``(x, x)`` for an integer and a pair as it is.

    Raises:
        TypeError: ``x`` is neither.
    """
    if isinstance(x, int):
        return (x, x)
    if isinstance(x, tuple) and len(x) == 2:
        return x
    raise TypeError(f"a size must be an integer or a tuple (height, width), not {x!r}")


def resample_patch_embedding(weight: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Fit a patch embedding to patches of another size by the pseudo-inverse of resizing (FlexiViT).

    Resizing a patch is a linear map ``B`` of its pixels (bicubic, antialiased). The new weights are those
    whose products with resized patches come closest to the old products with the original ones,
    ``pinv(B^T) w``: equal where the patch grows, least squares where it shrinks (Beyer et al. 2023,
    arXiv:2212.08013, section 3.4).

    Args:
        weight: ``[D, C, p, p]``.
        patch_size: rows and columns wanted, pixels.

    Returns:
        ``[D, C, *patch_size]`` in the dtype of ``weight``.
    """
    pixels = weight.shape[-2] * weight.shape[-1]
    # Every row is one unit pixel; resizing them all writes out the matrix of the map.
    units = torch.eye(pixels, dtype=torch.float64).view(pixels, 1, *weight.shape[-2:])
    resized = F.interpolate(units, size=patch_size, mode="bicubic", antialias=True)
    inverse = torch.linalg.pinv(resized.flatten(1))  # [new pixels, old pixels]
    fitted = weight.double().flatten(2) @ inverse.T  # [D, C, new pixels]
    return fitted.unflatten(2, patch_size).to(weight.dtype)


class PatchEmbed(nn.Module):
    """Project non-overlapping patches of an image linearly.

    Args:
        img_size: pixels of the images the position embeddings are laid out for, one side or (height, width).
        patch_size: pixels of a patch.
        in_chans: image channels C.
        embed_dim: token width D.
        norm_layer: makes a normalisation of the tokens; none if not given.
        flatten_embedding: return a sequence rather than a grid of tokens.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        norm_layer: Callable[[int], nn.Module] | None = None,
        flatten_embedding: bool = True,
    ) -> None:
        super().__init__()
        self.img_size = make_2tuple(img_size)
        self.patch_size = make_2tuple(patch_size)
        rows, columns = (
            pixels // patch for pixels, patch in zip(self.img_size, self.patch_size, strict=True)
        )
        self.patches_resolution = (rows, columns)
        self.num_patches = rows * columns
        self.in_chans = in_chans
        self.embed_dim = embed_dim
        self.flatten_embedding = flatten_embedding
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=self.patch_size, stride=self.patch_size)
        self.norm = nn.Identity() if norm_layer is None else norm_layer(embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Embed images.

        Args:
            x: ``[B, C, H, W]``, H and W multiples of the patch size.

        Returns:
            Tokens ``[B, N, D]``, row by row, or ``[B, H/p, W/p, D]`` without flattening.

        Raises:
            ConfigError: H or W is not a multiple of the patch size.
        """
        height, width = x.shape[-2:]
        patch_height, patch_width = self.patch_size
        if height % patch_height or width % patch_width:
            raise ConfigError(
                f"an image of {height} x {width} pixels does not divide into patches of "
                f"{patch_height} x {patch_width}; resize or crop it, for example to "
                f"{-(-height // patch_height) * patch_height} x {-(-width // patch_width) * patch_width}"
            )
        # Patches do not overlap, so the convolution is one matrix product, which is faster by far on a GPU.
        patches = x.unflatten(3, (-1, patch_width)).unflatten(2, (-1, patch_height))  # [B, C, h, p, w, p]
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3)  # [B, h, w, C * p * p]
        grid = self.norm(F.linear(patches, self.proj.weight.flatten(1), self.proj.bias))
        return grid.flatten(1, 2) if self.flatten_embedding else grid

    def flops(self) -> float:
        """Return the multiply-adds for one image of ``img_size``."""
        per_patch = self.in_chans * self.patch_size[0] * self.patch_size[1]
        norm = 0 if isinstance(self.norm, nn.Identity) else self.num_patches * self.embed_dim
        return self.num_patches * self.embed_dim * per_patch + norm
