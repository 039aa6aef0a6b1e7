"""Block masks over the patch grid, for the iBOT objective (BEiT, arXiv:2106.08254, algorithm 1)."""

import math
import random

import numpy as np

PLACEMENT_ATTEMPTS = 10


class MaskingGenerator:
    """Draws boolean masks made of rectangles of random area, shape and place.

    Rectangles may overlap. They are added until the requested number of patches is masked or no further
    one fits, so a mask may fall a few patches short of the request but never exceeds it. Randomness is
    Python's ``random``.

    Args:
        input_size: patch grid, (H, W) or one number for a square, in patches.
        num_masking_patches: only the default of ``max_num_patches``.
        min_num_patches: smallest area drawn for a rectangle, in patches.
        max_num_patches: largest number of patches that one rectangle may add; None means no limit but the
            request.
        min_aspect: smallest ratio of height to width.
        max_aspect: largest ratio of height to width; None means ``1 / min_aspect``.
    """

    def __init__(
        self,
        input_size: int | tuple[int, int],
        num_masking_patches: int | None = None,
        min_num_patches: int = 4,
        max_num_patches: float | None = None,
        min_aspect: float = 0.3,
        max_aspect: float | None = None,
    ) -> None:
        self.height, self.width = (input_size, input_size) if isinstance(input_size, int) else input_size
        self.num_masking_patches = num_masking_patches
        self.min_num_patches = min_num_patches
        self.max_num_patches = num_masking_patches if max_num_patches is None else max_num_patches
        self.log_aspect_range = (math.log(min_aspect), math.log(max_aspect or 1 / min_aspect))

    def __repr__(self) -> str:
        low, high = self.log_aspect_range
        return (
            f"{type(self).__name__}({self.height}x{self.width}, rectangles of {self.min_num_patches} to "
            f"{self.max_num_patches} patches, aspect {math.exp(low):.3f} to {math.exp(high):.3f}, "
            f"num_masking_patches={self.num_masking_patches})"
        )

    def get_shape(self) -> tuple[int, int]:
        """Return the patch grid (H, W)."""
        return self.height, self.width

    def __call__(self, num_masking_patches: int = 0) -> np.ndarray:
        """Return a boolean mask [H, W] with at most ``num_masking_patches`` True cells."""
        mask = np.zeros(self.get_shape(), dtype=bool)
        limit = math.inf if self.max_num_patches is None else self.max_num_patches
        remaining = num_masking_patches
        while remaining > 0:
            added = self._add_rectangle(mask, min(remaining, limit))
            if not added:
                break
            remaining -= added
        return mask

    def _add_rectangle(self, mask: np.ndarray, most: float) -> int:
        """Mask one more rectangle in place; return how many cells were new, 0 when none fitted."""
        for _ in range(PLACEMENT_ATTEMPTS):
            area = random.uniform(self.min_num_patches, most)
            aspect = math.exp(random.uniform(*self.log_aspect_range))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height >= self.height or width >= self.width:
                continue
            top = random.randint(0, self.height - height)
            left = random.randint(0, self.width - width)
            rectangle = mask[top : top + height, left : left + width]
            added = rectangle.size - int(np.count_nonzero(rectangle))
            if 0 < added <= most:
                rectangle[...] = True
                return added
        return 0
