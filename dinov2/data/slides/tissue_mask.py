"""Where a slide has tissue: a mask at low resolution that answers "how much of this tile is tissue?"."""

from dataclasses import dataclass, field

import numpy as np

from dinov2.errors import DatasetError


@dataclass
class TissueMask:
    """Tissue of one slide, with what was taken out of it.

    Args:
        mask: (H, W) bool, True where there is tissue.
        downsample: level-0 pixels per mask pixel, (x, y).
        mpp: microns per level-0 pixel; None if unknown, and then there is no :attr:`area_mm2`.
        pen: (H, W) bool, pixels removed as marker ink, or None for none.
        artefact: (H, W) bool, pixels removed as dust, glass edges or unscanned black, or None for none.
        source: what the mask was made from, for records: ``otsu`` or the name of a file.
        threshold: the saturation above which a pixel counted as tissue, 0 to 1; None for masks from files.
    """

    mask: np.ndarray
    downsample: tuple[float, float]
    mpp: float | None = None
    pen: np.ndarray | None = None
    artefact: np.ndarray | None = None
    source: str = "otsu"
    threshold: float | None = None
    _integral: np.ndarray | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.mask.ndim != 2 or self.mask.dtype != bool or not self.mask.size:
            raise DatasetError(
                f"a tissue mask has to be a filled bool array [H, W], not {self.mask.dtype} "
                f"{list(self.mask.shape)}: give mask > 0 of one channel"
            )

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_integral": None}  # quickly made again, and larger than the mask

    def tissue_share(
        self, x: np.ndarray | float, y: np.ndarray | float, side: np.ndarray | float
    ) -> np.ndarray:
        """Return the share of each square that is tissue; what lies outside the mask is none.

        Args:
            x, y: upper left corners in level-0 pixels, numbers or arrays of one shape.
            side: of the squares, in level-0 pixels.

        Returns:
            Shares in [0, 1], float64, of the common shape, to nine digits: sums of floats would make
            1 - 1e-16 of a whole square of tissue, less than a limit of 1.
        """
        left, top = np.asarray(x, float), np.asarray(y, float)
        right, bottom = left + side, top + side
        covered = self._sum(right, bottom) - self._sum(left, bottom) - self._sum(right, top)
        covered = covered + self._sum(left, top)
        mask_pixels = np.asarray(side, float) ** 2 / (self.downsample[0] * self.downsample[1])
        return np.clip(np.round(covered / mask_pixels, 9), 0.0, 1.0)

    @property
    def area_mm2(self) -> float:
        """Area of the tissue in square millimetres; NaN where the pixel size is unknown."""
        if self.mpp is None:
            return float("nan")
        pixel_um2 = self.downsample[0] * self.downsample[1] * self.mpp**2
        return int(self.mask.sum()) * pixel_um2 / 1e6

    def _sum(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Tissue pixels above and left of level-0 points.

        Between the pixel corners the sum of a mask is bilinear, so interpolating the integral image is exact.
        """
        height, width = self.mask.shape
        column = np.clip(x / self.downsample[0], 0, width)
        row = np.clip(y / self.downsample[1], 0, height)
        left, top = np.minimum(column.astype(int), width - 1), np.minimum(row.astype(int), height - 1)
        across, down = column - left, row - top
        table = self._table()
        upper = table[top, left] * (1 - across) + table[top, left + 1] * across
        lower = table[top + 1, left] * (1 - across) + table[top + 1, left + 1] * across
        return upper * (1 - down) + lower * down

    def _table(self) -> np.ndarray:
        if self._integral is None:
            height, width = self.mask.shape
            table = np.zeros((height + 1, width + 1), np.uint32)
            np.cumsum(self.mask, axis=0, dtype=np.uint32, out=table[1:, 1:])
            np.cumsum(table[1:, 1:], axis=1, out=table[1:, 1:])
            self._integral = table
        return self._integral
