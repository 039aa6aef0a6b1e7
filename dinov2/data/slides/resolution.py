"""How large a pixel of a slide is, in micrometres per pixel (mpp), and by which entry of its file."""

import logging
from collections.abc import Callable, Mapping
from functools import lru_cache

from dinov2.errors import DatasetError

logger = logging.getLogger("dinov2")

# Scanners lie well inside; entries of picture programs (72 dots per inch are 353 um) lie outside.
PLAUSIBLE_MPP = (0.01, 50.0)
ANISOTROPY_TOLERANCE = 0.01
OVERRIDE = "override"
ASSUMED = "assumed"
_MICROMETRES = {"centimeter": 1e4, "centimetre": 1e4, "inch": 25400.0}
# 40x is 0.25 um, 20x is 0.5 um and so on.
_MPP_TIMES_POWER = 10.0


def find_mpp(
    properties: Mapping[str, str],
    *,
    override: float | None = None,
    assumed: float | None = None,
    path: str = "",
) -> tuple[float, str]:
    """Return the um per level-0 pixel and the name of the rule that gave it.

    The first rule that holds: ``override``, the mean of ``openslide.mpp-x/-y``, TIFF's resolution tags,
    ``aperio.MPP``, 10 / ``openslide.objective-power``, ``assumed``. Values that no scanner has count as
    missing.

    Args:
        properties: name -> text, by OpenSlide's names.
        override: what the caller knows better than the file; the log tells when the two differ.
        assumed: what to take where the file says nothing.
        path: of the slide, for messages.

    Raises:
        DatasetError: no rule holds, or a given value is not plausible.
    """
    for given in (override, assumed):
        if given is not None and not PLAUSIBLE_MPP[0] <= given <= PLAUSIBLE_MPP[1]:
            low, high = PLAUSIBLE_MPP
            raise DatasetError(
                f'the mpp given for the slide "{path}" is {given}; it takes um per pixel, {low} to {high}'
            )
    found = _mpp_of_file(properties, path)
    if override is not None:
        if found and abs(found[0] / override - 1) > ANISOTROPY_TOLERANCE:
            _warn_once(f'slide "{path}": the given mpp {override:g} is used; {found[1]} says {found[0]:g}')
        return float(override), OVERRIDE
    if not found and assumed is not None:
        return float(assumed), ASSUMED
    if not found:
        raise DatasetError(
            f'the slide "{path}" does not say how large its pixels are: give its mpp (um per level-0 pixel; '
            "about 0.25 at 40x, 0.5 at 20x), in the column mpp of a CSV or, to extract features, by "
            "--assume-mpp"
        )
    return found


def _mpp_of_file(properties: Mapping[str, str], path: str) -> tuple[float, str] | None:
    pair = _pair(properties, "openslide.mpp-x", "openslide.mpp-y", lambda value: value)
    if pair:
        return _mean(pair, path), "openslide.mpp"
    # "centimeter" by OpenSlide, "RESUNIT.CENTIMETER" or "CENTIMETER" by tiffslide
    unit = properties.get("tiff.ResolutionUnit", "").lower().rpartition(".")[2]
    if unit in _MICROMETRES:
        pair = _pair(
            properties, "tiff.XResolution", "tiff.YResolution", lambda value: _MICROMETRES[unit] / value
        )
        if pair:
            return _mean(pair, path), "tiff.Resolution"
    for key, to_mpp in (
        ("aperio.MPP", lambda value: value),
        ("openslide.objective-power", lambda value: _MPP_TIMES_POWER / value),
    ):
        value = _plausible(properties.get(key), to_mpp)
        if value is not None:
            return value, key
    return None


def _pair(
    properties: Mapping[str, str], x_key: str, y_key: str, to_mpp: Callable[[float], float]
) -> tuple[float, float] | None:
    x, y = (_plausible(properties.get(key), to_mpp) for key in (x_key, y_key))
    return None if x is None or y is None else (x, y)


def _plausible(text: str | None, to_mpp: Callable[[float], float]) -> float | None:
    """Return an entry as mpp, None if it is missing, no number or nothing that a scanner makes."""
    try:
        mpp = to_mpp(float(text))
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    return mpp if PLAUSIBLE_MPP[0] <= mpp <= PLAUSIBLE_MPP[1] else None


def _mean(pair: tuple[float, float], path: str) -> float:
    x, y = pair
    if abs(x - y) > ANISOTROPY_TOLERANCE * min(x, y):
        _warn_once(f'slide "{path}" has pixels of {x:g} x {y:g} um, which are read as if they were square')
    return (x + y) / 2


@lru_cache(maxsize=4096)
def _warn_once(text: str) -> None:
    """A process opens the same slide many times."""
    logger.warning(text)
