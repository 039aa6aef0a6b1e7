"""Slides read at any resolution: the pixels are those of the file, wherever they are asked for."""

import gc
import logging
import os
import pickle
import shutil
import sys
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import tifffile

from dinov2.data.slides import open_slide
from dinov2.errors import ConfigError, DatasetError, ImageReadError
from tests.data.slides.conftest import MPP, SVS, halved, write_tiff

BACKENDS = ["openslide", "tiffslide"]


def region(slide, *place, **options):
    return np.asarray(slide.read(*place, **options)).astype(int)


def handles_on(path):
    return sum(os.path.realpath(fd) == str(path) for fd in Path("/proc/self/fd").iterdir())


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_real_slide(backend, pixels):
    with open_slide(str(SVS), backend=backend) as slide:
        assert slide.dimensions == (2220, 2967)
        assert (slide.mpp, slide.mpp_source) == (MPP, "openslide.mpp")
        assert slide.bounds == (0, 0, 2220, 2967)
        assert slide.level_downsamples == (1.0,)
        assert slide.backend == backend
        assert np.array_equal(region(slide, 301, 407, 224, MPP), pixels[407:631, 301:525])
        assert np.array_equal(region(slide, 10, 20, (50, 30), MPP), pixels[20:50, 10:60])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_coarser_read_is_the_mean_of_fine_pixels(backend, pixels):
    slide = open_slide(str(SVS), backend=backend)
    for times in (2, 3, 5):
        expected = halved(pixels[400 : 400 + 96 * times, 300 : 300 + 96 * times], times)
        got = region(slide, 300, 400, 96, MPP * times)
        assert np.abs(got - expected).max() <= 1, times  # rounding


def test_between_whole_factors_a_read_is_an_average_too(pixels):
    slide = open_slide(str(SVS))
    got = region(slide, 450, 2650, 100, MPP * 2.5)
    # Averages of 2.5 x 2.5 pixels, from each pixel repeated 2 x 2.
    fine = pixels[2650:2900, 450:700].repeat(2, axis=0).repeat(2, axis=1)
    assert np.abs(got - halved(fine, 5)).mean() < 4
    shifted = halved(pixels[2652:2902, 452:702].repeat(2, axis=0).repeat(2, axis=1), 5)
    assert np.abs(got - shifted).mean() > 8  # two pixels off


def test_a_read_at_twice_the_mpp_is_the_level_of_that_mpp(pyramid, pixels):
    slide = open_slide(str(pyramid))
    assert slide.level_downsamples == (1.0, 2.0, 4.0)
    for times in (2, 4):
        expected = halved(pixels[400 : 400 + 128 * times, 800 : 800 + 128 * times], times)
        assert np.array_equal(region(slide, 800, 400, 128, MPP * times), expected)


def test_a_level_within_five_percent_is_read_as_it_is(pyramid):
    slide = open_slide(str(pyramid))
    for mpp, factor in ((MPP * 2 * 1.04, 2.0), (MPP * 2 * 0.96, 2.0), (MPP * 0.96, 1.0), (0.5, 1.0)):
        assert slide.downsample(mpp) == factor
        assert slide.patch_size_level0(224, mpp) == 224 * factor
        exact = region(slide, 400, 400, 64, MPP * factor)
        assert np.array_equal(region(slide, 400, 400, 64, mpp), exact)
    assert slide.downsample(MPP * 2 * 1.1) == pytest.approx(2.2)
    assert slide.patch_size_level0(100, MPP * 2.2) == 220


def test_the_level_used_is_the_coarsest_that_is_fine_enough(jpeg_pyramid, monkeypatch):
    slide = open_slide(str(jpeg_pyramid))
    levels, read = [], slide._opened().read
    monkeypatch.setattr(
        slide._handle, "read", lambda x, y, level, *rest: levels.append(level) or read(x, y, level, *rest)
    )
    for factor in (1, 1.5, 1.97, 2.5, 3.9, 4, 9):
        slide.read(0, 0, 32, MPP * factor)
    assert levels == [0, 0, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("name", ["pyramid", "jpeg_pyramid"])
def test_the_backends_agree(name, request):
    path = request.getfixturevalue(name)
    first, second = (open_slide(str(path), backend=backend) for backend in BACKENDS)
    assert first.level_downsamples == second.level_downsamples
    assert (first.mpp, first.mpp_source) == (second.mpp, second.mpp_source)
    for x, y, size, factor in ((0, 0, 100, 1), (500, 300, 64, 2), (500, 300, 64, 3.1), (444, 888, 50, 4)):
        a, b = (region(slide, x, y, size, slide.mpp * factor) for slide in (first, second))
        assert np.array_equal(a, b), factor
    # Between the pixels of a level one takes the nearest, the other may mix neighbours.
    a, b = (region(slide, 501, 303, 64, slide.mpp * 4) for slide in (first, second))
    assert np.abs(a - b).mean() < 12


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["svs", "pyramid", "jpeg_pyramid"])
def test_outside_is_white(name, backend, request):
    path = SVS if name == "svs" else request.getfixturevalue(name)
    slide = open_slide(str(path), backend=backend)
    height = slide.dimensions[1]
    got = region(slide, -40, height - 60, 100, MPP)
    assert (got[:, :40] == 255).all()
    assert (got[60:] == 255).all()
    assert np.array_equal(got[:60, 40:], region(slide, 0, height - 60, (60, 60), MPP))
    assert (region(slide, 5000, 5000, 20, MPP * 2) == 255).all()


def test_transparency_lies_over_the_background(tmp_path):
    """A slide with a hole: OpenSlide gives see-through pixels where a file leaves tiles out."""
    array = np.full((512, 512, 3), 90, np.uint8)
    path = write_tiff(tmp_path / "hole.tiff", array, compression="deflate")
    slide = open_slide(str(path), backend="openslide")
    slide.background = "#0a141e"
    got = region(slide, 256, 256, 512, MPP)
    assert (got[:256, :256] == 90).all()
    assert (got[256:] == (10, 20, 30)).all()


def test_thumbnails(pyramid, pixels):
    slide = open_slide(str(pyramid))
    small = slide.thumbnail(max_side=370)
    assert small.size == (278, 370)
    assert slide.thumbnail(MPP * 8).size == (278, 370)
    expected = halved(pixels[:2960], 8)
    assert np.abs(np.asarray(small)[:, :277].astype(int) - expected).mean() < 4
    with pytest.raises(ConfigError, match="either its mpp or its max_side"):
        slide.thumbnail()


def test_large_regions_are_read_in_blocks(pixels, monkeypatch):
    slide = open_slide(str(SVS))
    whole = np.asarray(slide.thumbnail(MPP * 6))
    monkeypatch.setattr("dinov2.data.slides.reader._BLOCK_SIDE", 500)
    assert np.array_equal(np.asarray(slide.thumbnail(MPP * 6)), whole)
    assert np.array_equal(np.asarray(slide.read(0, 0, slide.dimensions, MPP)), pixels)


def test_nothing_finer_than_the_slide_is_made_up():
    with pytest.raises(DatasetError, match="nothing finer, but 0.25 um are asked for: ask for 0.499 or more"):
        open_slide(str(SVS)).read(0, 0, 224, 0.25)


def test_what_can_not_be_opened_is_explained_by_both_libraries(tmp_path):
    broken = tmp_path / "broken.svs"
    broken.write_bytes(b"no slide")
    with pytest.raises(DatasetError, match="can not be opened .*openslide: .*tiffslide: "):
        open_slide(str(broken))
    with pytest.raises(DatasetError, match="there is no slide file"):
        open_slide(str(tmp_path / "missing.svs"))
    with pytest.raises(ConfigError, match='did you mean "openslide"'):
        open_slide(str(SVS), backend="openslid")


def test_auto_takes_the_library_that_is_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "openslide", None)  # as if it were not installed
    assert open_slide(str(SVS)).backend == "tiffslide"
    with pytest.raises(ConfigError, match="the slide backend openslide is not installed: pip install"):
        open_slide(str(SVS), backend="openslide")
    monkeypatch.setitem(sys.modules, "tiffslide", None)
    with pytest.raises(DatasetError, match="openslide is not installed.*tiffslide is not installed"):
        open_slide(str(SVS))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("compression", ["jpeg", "deflate"])
def test_a_damaged_tile_is_an_error_that_names_its_place_and_spares_the_rest(
    compression, backend, tmp_path, pixels
):
    path = write_tiff(tmp_path / "slide.tiff", pixels[:1024, :1024], compression=compression)
    with tifffile.TiffFile(path) as file:
        place, length = file.pages[0].dataoffsets[-1], file.pages[0].databytecounts[-1]
    with path.open("r+b") as stream:
        stream.seek(place)
        stream.write(bytes(length))
    slide = open_slide(str(path), backend=backend)
    for _ in range(2):
        with pytest.raises(
            ImageReadError, match=r"slide.tiff.* at x=768, y=768, 224 x 224 pixels of level 0"
        ):
            slide.read(768, 768, 224, MPP)
        assert slide.read(0, 0, 224, MPP).size == (224, 224)


def test_a_slide_survives_pickling_without_its_handle():
    slide = open_slide(str(SVS))
    expected = region(slide, 0, 0, 64, MPP)
    copy = pickle.loads(pickle.dumps(slide))
    assert copy._handle is None
    assert copy.mpp == slide.mpp
    assert np.array_equal(region(copy, 0, 0, 64, MPP), expected)


@pytest.fixture
def own_copy(tmp_path):
    """A file that no other test has open."""
    return shutil.copy(SVS, tmp_path)


def test_closing_gives_every_handle_back(own_copy):
    for backend in BACKENDS * 10:
        with open_slide(str(own_copy), backend=backend) as slide:
            slide.read(0, 0, 64, MPP)
            assert handles_on(own_copy) > 0
        assert handles_on(own_copy) == 0
    slide.read(0, 0, 64, MPP)  # opens again
    assert handles_on(own_copy) > 0
    del slide
    gc.collect()
    assert handles_on(own_copy) == 0


def _sum_of(slide):
    return os.getpid(), int(np.asarray(slide.read(100, 100, 64, MPP)).sum())


# A spawned process imports everything anew, which is slow; what it gets is the same for both libraries.
@pytest.mark.parametrize(
    ("method", "backend"), [("fork", "openslide"), ("fork", "tiffslide"), ("spawn", "auto")]
)
def test_slides_reach_worker_processes_of_any_kind(method, backend):
    slide = open_slide(str(SVS), backend=backend)
    expected = _sum_of(slide)[1]
    with get_context(method).Pool(1) as pool:
        process, got = pool.apply(_sum_of, (slide,))
    assert process != os.getpid()
    assert got == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_handle_crosses_a_fork(backend, own_copy):
    slide = open_slide(str(own_copy), backend=backend)
    slide.read(0, 0, 64, MPP)
    assert handles_on(own_copy) > 0
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        inherited = handles_on(own_copy)
        opened_again = _sum_of(slide)[1] % 251
        os.write(writer, bytes([inherited, opened_again]))
        os._exit(0)
    os.waitpid(child, 0)
    assert tuple(os.read(reader, 2)) == (0, _sum_of(slide)[1] % 251)


def test_pixels_that_are_not_square_are_told(tmp_path, pixels, caplog):
    path = write_tiff(tmp_path / "oblong.tiff", pixels[:512, :512], mpp=(0.5, 0.52))
    with caplog.at_level(logging.WARNING, logger="dinov2"):
        slide = open_slide(str(path))
    assert slide.mpp == pytest.approx(0.51)
    assert "pixels of 0.5 x 0.52 um" in caplog.text
