"""The real slide, and TIFF slides made from its pixels."""

import numpy as np
import pytest
import tifffile

from tests.conftest import REAL_DATA

SVS = REAL_DATA / "cmu_small_region.svs"
MPP = 0.499  # um per pixel, by the file


@pytest.fixture(scope="session")
def pixels():
    """Level 0 of the real slide, (2967, 2220, 3) uint8, by a library that the reader does not use."""
    with tifffile.TiffFile(SVS) as file:
        return file.pages[0].asarray()


def halved(array, times):
    """The mean of times x times pixels, computed here and not by the reader."""
    height, width = (side // times * times for side in array.shape[:2])
    blocks = array[:height, :width].reshape(height // times, times, width // times, times, 3)
    return blocks.mean(axis=(1, 3)).round().astype(np.uint8)


def write_tiff(path, array, *, levels=(1,), mpp=MPP, unit="CENTIMETER", compression="jpeg", **options):
    """Write a tiled TIFF; ``mpp`` is one number or (x, y), None leaves the resolution out."""
    per_unit = {"CENTIMETER": 1e4, "INCH": 25400.0, "NONE": 1.0}[unit]
    x, y = mpp if isinstance(mpp, tuple) else (mpp, mpp)
    with tifffile.TiffWriter(path, bigtiff=options.pop("bigtiff", False)) as file:
        for times in levels:
            place = {} if mpp is None else {"resolution": (per_unit / x / times, per_unit / y / times)}
            file.write(
                halved(array, times),
                tile=(256, 256),
                compression=compression,
                compressionargs={"level": 95} if compression == "jpeg" else {},
                photometric="rgb",
                subfiletype=int(times > 1),
                resolutionunit=unit if mpp is not None else None,
                metadata=None,
                **place,
                **options,
            )
    return path


@pytest.fixture(scope="session")
def pyramid(tmp_path_factory, pixels):
    """The real slide as a pyramid of three levels in lossless tiles, mpp from its resolution tags."""
    # Even sides: the downsample factors are exactly 1, 2 and 4.
    return write_tiff(
        tmp_path_factory.mktemp("pyramid") / "pyramid.tiff",
        pixels[:2960],
        levels=(1, 2, 4),
        compression="deflate",
    )


@pytest.fixture(scope="session")
def jpeg_pyramid(tmp_path_factory, pixels):
    """The same in JPEG tiles."""
    return write_tiff(tmp_path_factory.mktemp("pyramid") / "jpeg.tiff", pixels[:2960], levels=(1, 2, 4))
