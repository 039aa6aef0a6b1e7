"""What is coloured or dark on a slide without being tissue: marker ink, dust, unscanned black.

Stained tissue absorbs green at least as strongly as red: haematoxylin and eosin by their dyes (Ruifrok and
Johnston 2001, Anal. Quant. Cytol. Histol. 23), DAB as well. Green and blue ink absorb red the most, red ink
absorbs green and blue alike and no red, and black ink and dust absorb all three alike. Optical density
(OD, the decimal logarithm of 255 over the value) tells these apart pixel by pixel; the area does the rest,
since a stroke of a marker is larger than anything in tissue that happens to look like it.

Stains that are blue or green themselves (Masson's trichrome, Alcian blue) do look like ink: switch the
removal off for them.
"""

from dataclasses import dataclass

import numpy as np

# A marker is half a millimetre wide or more; 0.02 mm2 is a dot of 160 um.
MIN_PEN_UM2 = 20_000.0
# Ink thins out towards the edge of a stroke: how far the faint rim of a grey or red one may reach.
PEN_RIM_UM = 40.0


@dataclass(frozen=True)
class ColourPlanes:
    """A picture as seen by the rules below; all (H, W) float32.

    Attributes:
        saturation: HSV saturation, 0 to 1.
        value: brightest channel, 0 to 255.
        chroma: brightest less darkest channel, 0 to 255.
        red_excess: OD of red less OD of green.
        blue_excess: OD of blue less OD of green.
        red_density: OD of red.
    """

    saturation: np.ndarray
    value: np.ndarray
    chroma: np.ndarray
    red_excess: np.ndarray
    blue_excess: np.ndarray
    red_density: np.ndarray

    @classmethod
    def of(cls, picture: np.ndarray) -> "ColourPlanes":
        """Split an (H, W, 3) uint8 picture."""
        density = -np.log10((np.arange(256, dtype=np.float32) + 1) / 256)  # by value of a channel
        red, green, blue = (density[picture[..., channel]] for channel in range(3))
        value = picture.max(axis=2).astype(np.float32)
        chroma = value - picture.min(axis=2)
        saturation = chroma / np.maximum(value, 1)
        return cls(saturation, value, chroma, red - green, blue - green, red)


def balance_glass(picture: np.ndarray) -> np.ndarray:
    """Return the picture with the colour of empty glass made white, so that a tint is not taken for stain.

    The glass is the middle colour of the brightest tenth of what is pale; pure white, with which viewers fill
    what was not scanned, counts only if there is nothing else. A picture without pale parts stays as it is.

    Args:
        picture: (H, W, 3) uint8.
    """
    darkest, brightest = picture.min(axis=2), picture.max(axis=2)
    pale = (darkest > 170) & (brightest.astype(np.int16) - darkest < 36)
    for candidates in (pale & (darkest < 253), pale):
        if candidates.mean() < 0.01:
            continue
        limit = np.quantile(darkest[candidates], 0.9)
        glass = np.median(picture[candidates & (darkest >= limit)], axis=0)
        table = np.minimum(255, np.arange(256)[:, None] * 255.0 / glass).round().astype(np.uint8)
        return np.stack([table[picture[..., channel], channel] for channel in range(3)], axis=2)
    return picture


def find_pen(planes: ColourPlanes, *, pixel_um: float) -> np.ndarray:
    """Return where a green, blue, black or red marker was used, (H, W) bool.

    Every colour has a strict rule for the body of a stroke and a lenient one for its rim; only bodies of at
    least 0.02 mm2 count.
    """
    p = planes
    rim = max(1, round(PEN_RIM_UM / pixel_um))
    cold = (p.red_excess > 0.12) & (p.chroma > 12) & (p.saturation > 0.2)
    cold_rim = (p.red_excess > 0.03) & (p.chroma > 12)
    black = (p.value < 80) & (p.chroma < 26)
    grey_rim = (p.value < 215) & (p.chroma < 34)
    red = (p.red_density < 0.3) & (np.abs(p.blue_excess) < 0.12) & (p.red_excess < -0.45)
    red_rim = (np.abs(p.blue_excess) < 0.08) & (p.red_excess < -0.06)
    # Ink over nuclei is nearly black, so that a stroke across tissue is a body of both kinds.
    dark = _large(cold | black, pixel_um)
    return (
        _grow(dark & cold, cold_rim, 4 * rim)
        | _grow(dark & black, grey_rim, rim)
        | _grow(_large(red, pixel_um), red_rim, rim)
    )


def find_grey(planes: ColourPlanes) -> np.ndarray:
    """Return dust, the edges of cover slips and unscanned black: dark without colour, (H, W) bool."""
    from scipy import ndimage

    grey = (planes.value < 190) & (planes.chroma < 20)
    return ndimage.binary_opening(grey, np.ones((2, 2), bool))


def find_threads(mask: np.ndarray, *, pixel_um: float, max_width_um: float) -> np.ndarray:
    """Return the connected parts of a mask that are nowhere wider than the limit: fibres, edges."""
    from scipy import ndimage

    labels, count = ndimage.label(mask, np.ones((3, 3), bool))
    if not count:
        return np.zeros_like(mask)
    # The distance to the outside is half the width where a part is widest; beyond the picture is outside.
    inside = np.pad(mask, 1)
    radius = ndimage.distance_transform_edt(inside)[1:-1, 1:-1]
    widest = np.concatenate([[np.inf], ndimage.maximum(radius, labels, np.arange(1, count + 1))])
    return (2 * widest * pixel_um <= max_width_um)[labels]


def _large(seeds: np.ndarray, pixel_um: float) -> np.ndarray:
    from scipy import ndimage

    # Strokes are streaky: what lies a pixel apart is one stroke.
    labels, _ = ndimage.label(ndimage.binary_dilation(seeds), np.ones((3, 3), bool))
    pixels = np.bincount(labels[seeds], minlength=int(labels.max()) + 1)
    return (pixels * pixel_um**2 >= MIN_PEN_UM2)[labels] & seeds


def _grow(bodies: np.ndarray, rim: np.ndarray, steps: int) -> np.ndarray:
    from scipy import ndimage

    if not bodies.any():
        return bodies
    return ndimage.binary_dilation(bodies, np.ones((3, 3), bool), iterations=steps, mask=rim | bodies)
