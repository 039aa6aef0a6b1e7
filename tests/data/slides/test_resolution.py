"""Where the size of a pixel is taken from, and in which order."""

import logging

import pytest
import tifffile

from dinov2.data.slides import open_slide
from dinov2.data.slides.resolution import find_mpp
from dinov2.errors import DatasetError
from tests.data.slides.conftest import write_tiff

ALL = {
    "openslide.mpp-x": "0.25",
    "openslide.mpp-y": "0.252",
    "tiff.ResolutionUnit": "centimeter",
    "tiff.XResolution": "33333.3333",
    "tiff.YResolution": "33333.3333",
    "aperio.MPP": "0.35",
    "openslide.objective-power": "20",
}


def without(*beginnings):
    return {key: value for key, value in ALL.items() if not key.startswith(beginnings)}


@pytest.mark.parametrize(
    ("properties", "mpp", "source"),
    [
        (ALL, 0.251, "openslide.mpp"),
        (without("openslide.mpp"), 0.3, "tiff.Resolution"),
        (without("openslide.mpp-y"), 0.3, "tiff.Resolution"),
        (without("openslide.mpp", "tiff."), 0.35, "aperio.MPP"),
        (without("openslide.mpp", "tiff.", "aperio"), 0.5, "openslide.objective-power"),
        (
            {**without("openslide.mpp"), "tiff.ResolutionUnit": "RESUNIT.INCH"},
            25400 / 33333.3333,
            "tiff.Resolution",
        ),
        ({**without("openslide.mpp"), "tiff.ResolutionUnit": "none"}, 0.35, "aperio.MPP"),
        # What picture programs write: 72 dots per inch are 353 um.
        ({**ALL, "openslide.mpp-x": "352.7", "tiff.XResolution": "28.3"}, 0.35, "aperio.MPP"),
        (
            {**ALL, "openslide.mpp-x": "0", "tiff.XResolution": "0", "aperio.MPP": "n/a"},
            0.5,
            "openslide.objective-power",
        ),
    ],
)
def test_the_first_rule_that_holds(properties, mpp, source):
    found = find_mpp(properties)
    assert found == (pytest.approx(mpp), source)


def test_the_caller_wins_and_is_told_of_a_difference(caplog):
    with caplog.at_level(logging.WARNING, logger="dinov2"):
        assert find_mpp(ALL, override=0.2505, path="close.svs") == (0.2505, "override")
        assert not caplog.records
        assert find_mpp(ALL, override=0.5, path="far.svs") == (0.5, "override")
    assert "the given mpp 0.5 is used; openslide.mpp says 0.251" in caplog.text


def test_no_rule_no_guess():
    with pytest.raises(
        DatasetError, match='slide "x.tif" does not say how large its pixels are: give its mpp'
    ):
        find_mpp({"openslide.vendor": "generic-tiff"}, path="x.tif")
    with pytest.raises(DatasetError, match="mpp given for the slide .* is 224"):
        find_mpp(ALL, override=224.0)


@pytest.mark.parametrize("backend", ["openslide", "tiffslide"])
@pytest.mark.parametrize(("unit", "mpp"), [("CENTIMETER", 0.25), ("INCH", 0.5)])
def test_resolution_of_real_files(backend, unit, mpp, tmp_path, pixels):
    path = write_tiff(tmp_path / "slide.tiff", pixels[:512, :512], unit=unit, mpp=mpp)
    assert open_slide(str(path), backend=backend).mpp == pytest.approx(mpp)


@pytest.mark.parametrize("backend", ["openslide", "tiffslide"])
def test_aperio_entries_of_a_real_file(backend, tmp_path, pixels):
    """Objective power alone, and both entries, of which the mpp counts."""
    for text, mpp in (("AppMag = 40", 0.25), ("AppMag = 40|MPP = 0.2525", 0.2525)):
        path = tmp_path / "slide.svs"
        tifffile.imwrite(
            path,
            pixels[:512, :512],
            tile=(256, 256),
            compression="jpeg",
            photometric="rgb",
            description=f"Aperio Image Library v11\r\n512x512 (256x256) JPEG/RGB Q=95|{text}",
            metadata=None,
            resolutionunit=None,
        )
        assert open_slide(str(path), backend=backend).mpp == pytest.approx(mpp)


@pytest.mark.parametrize("backend", ["openslide", "tiffslide"])
def test_a_real_file_without_resolution(backend, tmp_path, pixels):
    path = write_tiff(tmp_path / "plain.tiff", pixels[:512, :512], mpp=1.0, unit="NONE")
    with pytest.raises(DatasetError, match="does not say how large its pixels are"):
        open_slide(str(path), backend=backend)
    slide = open_slide(str(path), mpp=0.25, backend=backend)
    assert (slide.mpp, slide.mpp_source) == (0.25, "override")
