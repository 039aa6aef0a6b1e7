"""Masks from other programs."""

import json

import numpy as np
import pytest
from PIL import Image

from dinov2.data.slides import open_slide
from dinov2.data.slides.mask_files import _draw, read_mask
from dinov2.errors import DatasetError
from tests.conftest import REAL_DATA

WIDTH, HEIGHT = 2220, 2967


@pytest.fixture(scope="module")
def slide():
    with open_slide(REAL_DATA / "cmu_small_region.svs") as slide:
        yield slide


@pytest.fixture
def lower_half():
    mask = np.zeros((297, 222), bool)
    mask[148:] = True
    return mask


@pytest.mark.parametrize("kind", ["npy", "1.png", "grey.png", "palette.png", "rgb.png"])
def test_pictures_and_arrays(tmp_path, slide, lower_half, kind):
    path = tmp_path / f"mask.{kind}"
    grey = Image.fromarray(lower_half.astype(np.uint8) * 3)  # a label map: any number but 0
    if kind == "npy":
        np.save(path, lower_half.astype(np.float32))
    elif kind == "palette.png":
        labels = Image.fromarray(lower_half.astype(np.uint8)).convert("P")
        labels.putpalette([255, 255, 255, 0, 0, 0])  # tissue is shown black
        labels.save(path)
    else:
        {"1.png": Image.fromarray(lower_half), "grey.png": grey, "rgb.png": grey.convert("RGB")}[kind].save(
            path
        )
    mask = read_mask(str(path), slide)
    assert (mask.mask == lower_half).all()
    assert mask.tissue_share(0, 0, 1400) == 0
    assert mask.tissue_share(500, 1600, 500) == 1
    assert mask.source == path.name
    assert mask.area_mm2 == pytest.approx(WIDTH * HEIGHT * 149 / 297 * 0.499**2 / 1e6, rel=1e-6)


def square(x, y, side):
    return [[x, y], [x + side, y], [x + side, y + side], [x, y + side], [x, y]]


def feature(geometry, name="Tissue"):
    return {"type": "Feature", "geometry": geometry, "properties": {"classification": {"name": name}}}


def polygon(*rings):
    return {"type": "Polygon", "coordinates": list(rings)}


SHAPES = [
    feature(polygon(square(160, 320, 800), square(400, 560, 160))),
    feature({"type": "MultiPolygon", "coordinates": [[square(1200, 320, 320)], [square(1200, 1600, 320)]]}),
    feature(polygon(square(160, 960, 160)), "Ignore*"),
]


@pytest.mark.parametrize(
    "content",
    [
        {"type": "FeatureCollection", "features": SHAPES},
        SHAPES,
    ],
    ids=["collection", "list"],
)
def test_outlines_of_qupath(tmp_path, slide, content):
    path = tmp_path / "outlines.geojson"
    path.write_text(json.dumps(content))
    mask = read_mask(str(path), slide)
    area = (800**2 - 160**2 + 2 * 320**2 - 160**2) * 0.499**2 / 1e6
    assert mask.area_mm2 == pytest.approx(area, rel=0.02)
    inside, hole, outside, second, ignored = (
        mask.tissue_share(x, y, 100) for x, y in [(200, 400), (430, 590), (0, 0), (1300, 1700), (190, 990)]
    )
    assert (inside, hole, outside, second, ignored) == pytest.approx((1, 0, 0, 1, 0), abs=1e-9)


def test_a_bare_geometry(tmp_path, slide):
    path = tmp_path / "one.json"
    path.write_text(json.dumps(polygon(square(0, 0, 1000))))
    assert read_mask(str(path), slide).tissue_share(10, 10, 900) == pytest.approx(1)


def test_a_polygon_is_filled_as_skimage_fills_it():
    from skimage.measure import grid_points_in_poly

    random = np.random.default_rng(3)
    for _ in range(20):
        ring = random.uniform(-10, 110, (random.integers(3, 12), 2)) * (
            16,
            12,
        )  # crosses itself and the border
        mask = np.zeros((90, 100), bool)
        _draw(mask, [ring], (16.0, 12.0))
        points = ring[:, ::-1] / (12.0, 16.0) - 0.5  # rows and columns of pixel middles
        assert (mask == grid_points_in_poly(mask.shape, points)).all()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.png", None, "is missing"),
        ("mask.gif", b"GIF89a", "unknown kind"),
        ("mask.png", b"no picture", "can not be read"),
        ("mask.npy", b"no array", "can not be read"),
        ("a.geojson", b"{", "is not JSON"),
        ("a.geojson", b'{"type": "FeatureCollection", "features": []}', "has no polygon"),
        ("a.geojson", b'{"type": "Point", "coordinates": [1, 2]}', 'geometry "Point"; accepted are Polygon'),
        ("a.geojson", b'{"type": "Polygon", "coordinates": [[1, 2]]}', "no list of x and y"),
    ],
)
def test_mistakes(tmp_path, slide, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DatasetError, match=message):
        read_mask(str(path), slide)


def test_a_mask_of_another_shape(tmp_path, slide):
    np.save(tmp_path / "mask.npy", np.ones((222, 297)))
    with pytest.raises(
        DatasetError, match=r"297 x 222 pixels, which is not the shape of the slide, 2220 x 2967"
    ):
        read_mask(str(tmp_path / "mask.npy"), slide)
