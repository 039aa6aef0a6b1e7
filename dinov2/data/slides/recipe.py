"""What is done to every slide of a tiling run; recorded with each slide, so that two recipes never mix."""

from dataclasses import asdict, dataclass, field

from dinov2.data.slides.grid import check_grid
from dinov2.data.slides.tissue import SegmentationSettings
from dinov2.errors import ConfigError

FORMATS = ("jpeg", "png")
# Copies differ in up to about 4 bits, and beyond 8 tiles of clearly different tissue would go.
MAX_HAMMING = 8


@dataclass(frozen=True)
class TilingRecipe:
    """Choices that decide which tiles there are and what they look like.

    Args:
        mpp: um per pixel of the tiles.
        size: their side in pixels.
        overlap: pixels that neighbours share.
        min_tissue: smallest share of tissue in a tile, 0 to 1; 0 keeps every tile with any.
        edges: ``drop`` or ``pad`` tiles that reach beyond the scanned area.
        format: ``jpeg`` or ``png``.
        quality: of JPEG, 1 to 100.
        coords_only: write coordinates for other programs and no pictures.
        near_duplicates: drop a tile whose perceptual hash differs from that of an earlier tile of the slide
            in at most so many of 64 bits; None drops none.
        max_tiles: keep so many tiles of a slide, drawn at random; None keeps all.
        seed: of that draw.
        allow_upsampling: make tiles that are finer than the slide.
        segmentation: how tissue is found where no mask is given.

    Raises:
        ConfigError: a value is out of its range.
    """

    mpp: float = 0.5
    size: int = 224
    overlap: int = 0
    min_tissue: float = 0.25
    edges: str = "drop"
    format: str = "jpeg"
    quality: int = 90
    coords_only: bool = False
    near_duplicates: int | None = None
    max_tiles: int | None = None
    seed: int = 0
    allow_upsampling: bool = False
    segmentation: SegmentationSettings = field(default_factory=SegmentationSettings)

    def __post_init__(self) -> None:
        check_grid(
            size=self.size, mpp=self.mpp, overlap=self.overlap, min_tissue=self.min_tissue, edges=self.edges
        )
        if self.format not in FORMATS:
            raise ConfigError(f'the format is "{self.format}"; accepted are {" and ".join(FORMATS)}')
        if not 1 <= self.quality <= 100:
            raise ConfigError(f"the quality is {self.quality}; it takes 1 to 100, such as 90")
        if self.near_duplicates is not None and not 0 <= self.near_duplicates <= MAX_HAMMING:
            raise ConfigError(
                f"the threshold of near duplicates is {self.near_duplicates}; it takes 0 to {MAX_HAMMING} of "
                "64 bits, such as 4: with more, clearly different tissue would go"
            )
        if self.near_duplicates is not None and self.coords_only:
            raise ConfigError("near duplicates are found on pictures; they can not be used with coords-only")
        if self.max_tiles is not None and self.max_tiles < 1:
            raise ConfigError(f"max_tiles is {self.max_tiles}; it takes at least 1, or leave it out for all")

    def as_dict(self) -> dict:
        """Return plain values for a record."""
        return asdict(self)


def differences(recorded: dict, wanted: dict, prefix: str = "") -> list[str]:
    """Name what two records differ in, as ``mpp 0.5 -> 1.0``."""
    found = []
    for key in sorted({*recorded, *wanted}):
        before, after = recorded.get(key), wanted.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append(f"{prefix}{key} {before} -> {after}")
    return found
