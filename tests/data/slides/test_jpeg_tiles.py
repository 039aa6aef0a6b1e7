"""Reading JPEG tiles directly gives the pixels that the libraries give, and is used for no other file."""

import random

import numpy as np
import pytest
import tifffile

from dinov2.data.slides import jpeg_tiles
from dinov2.data.slides.backends import BACKENDS
from dinov2.data.slides.jpeg_tiles import JpegTileBackend, with_jpeg_tiles
from dinov2.data.slides.tiff_tags import read_directories
from tests.data.slides.conftest import SVS, write_tiff

WHITE = "#ffffff"


def both(path, name="openslide"):
    return BACKENDS[name](str(path)), with_jpeg_tiles(BACKENDS[name](str(path)), str(path))


def assert_equal_reads(library, direct, level=0, step=1, count=40):
    assert isinstance(direct, JpegTileBackend)
    assert level in direct._levels
    random_number = random.Random(0)
    width, height = library.level_dimensions[0]
    for _ in range(count):
        x, y = (random_number.randrange(-200, side + 100) // step * step for side in (width, height))
        size = (random_number.randrange(1, 400), random_number.randrange(1, 400))
        expected = np.asarray(library.read(x, y, level, size, WHITE))
        assert np.array_equal(np.asarray(direct.read(x, y, level, size, WHITE)), expected), (x, y, size)


@pytest.mark.parametrize("name", BACKENDS)
def test_the_real_slide(name):
    assert_equal_reads(*both(SVS, name))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("level", [0, 1, 2])
def test_every_level_of_a_pyramid(name, level, jpeg_pyramid):
    assert_equal_reads(*both(jpeg_pyramid, name), level=level, step=4)


@pytest.mark.parametrize(
    "options",
    [
        {"bigtiff": True},
        {"byteorder": ">"},
        {"subsampling": None, "colours": "ycbcr"},
        {"colours": "ycbcr"},
    ],
    ids=["bigtiff", "big-endian", "ycbcr-444", "ycbcr-422"],
)
def test_kinds_of_files(options, tmp_path, pixels):
    path = tmp_path / "slide.tiff"
    colours = options.pop("colours", "rgb")
    writer = {key: options.pop(key) for key in ("bigtiff", "byteorder") if key in options}
    with tifffile.TiffWriter(path, **writer) as file:
        file.write(
            pixels[:700, :900],
            tile=(256, 256),
            compression="jpeg",
            photometric="rgb",
            subsampling=(2, 1) if colours == "ycbcr" and "subsampling" not in options else None,
            compressionargs={"level": 90, "outcolorspace": "YCBCR" if colours == "ycbcr" else "RGB"},
            metadata=None,
            resolution=(20000, 20000),
            resolutionunit="CENTIMETER",
        )
    # OpenSlide does not open TIFF files of the other byte order.
    assert_equal_reads(*both(path, "tiffslide" if "byteorder" in writer else "openslide"))


def test_other_files_are_left_to_the_library(pyramid, tmp_path, pixels):
    for path in (pyramid, write_tiff(tmp_path / "twice.tiff", pixels[:512, :512], levels=(1, 1))):
        library, chosen = both(path)
        assert type(chosen) is type(library)


def test_tiles_at_hand_are_bounded(monkeypatch):
    cache = jpeg_tiles._TileCache()
    monkeypatch.setattr(jpeg_tiles, "_cache", cache)
    monkeypatch.setattr(jpeg_tiles, "CACHE_BYTES", 5 * 4 * 240 * 240)
    _, direct = both(SVS)
    direct.read(0, 0, 0, (1200, 1200), WHITE)
    assert len(cache._tiles) == 5
    assert cache._bytes <= jpeg_tiles.CACHE_BYTES
    assert np.array_equal(
        direct.read(0, 0, 0, (500, 500), WHITE), both(SVS)[0].read(0, 0, 0, (500, 500), WHITE)
    )


def test_directories_are_those_that_another_library_finds():
    with tifffile.TiffFile(SVS) as file, SVS.open("rb") as stream:
        found = read_directories(stream.fileno())
        assert len(found) == len(file.pages)
        for tags, page in zip(found, file.pages, strict=True):
            assert tags[256][0] == page.imagewidth
            assert tags[257][0] == page.imagelength
        page = file.pages[0]
        assert found[0][324].values().tolist() == list(page.dataoffsets)
        assert [found[0][325][place] for place in (0, 77)] == [
            page.databytecounts[0],
            page.databytecounts[77],
        ]


def test_directories_in_a_circle_end(tmp_path):
    """A damaged file whose second directory points back to the first."""
    path = tmp_path / "circle.tiff"
    path.write_bytes(b"II*\0" + (8).to_bytes(4, "little") + b"\0\0" + (8).to_bytes(4, "little"))
    with path.open("rb") as stream:
        assert len(read_directories(stream.fileno())) == 1
