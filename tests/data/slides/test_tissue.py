"""Tissue on a slide with known truth, on the shipped real slide, and on pictures meant to deceive."""

import csv
import pickle

import numpy as np
import pytest
from PIL import Image

from dinov2.data.slides import open_slide
from dinov2.data.slides.quality import ColourPlanes, balance_glass, find_pen, find_threads
from dinov2.data.slides.tissue import SegmentationSettings, otsu_threshold, segment_picture, segment_tissue
from dinov2.data.slides.tissue_mask import TissueMask
from dinov2.errors import ConfigError, DatasetError
from tests.conftest import REAL_DATA
from tests.data.slides.drawn_slide import draw_slide, write_pyramid

PIXEL_UM = 8.0


@pytest.fixture(scope="module")
def drawn():
    return draw_slide()


@pytest.fixture(scope="module")
def drawn_mask(drawn, tmp_path_factory):
    with open_slide(write_pyramid(tmp_path_factory.mktemp("drawn") / "drawn.tif", drawn.picture)) as slide:
        return segment_tissue(slide)


@pytest.fixture(scope="module")
def nest():
    """The carcinoma picture as if scanned at 0.5 um, seen at 8 um."""
    with Image.open(REAL_DATA / "hgsc_nest.jpg") as picture:
        return np.asarray(picture.convert("RGB").reduce(16))


def shrunk(mask, shape):
    grey = Image.fromarray(mask).convert("L").resize(shape[::-1], Image.Resampling.BOX)
    return np.asarray(grey) > 127


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


def test_tissue_and_ink_are_where_they_were_drawn(drawn, drawn_mask):
    shape = drawn_mask.mask.shape
    assert shape == (210, 280)
    assert iou(shrunk(drawn.tissue, shape), drawn_mask.mask) > 0.96
    assert iou(shrunk(drawn.pen, shape), drawn_mask.pen) > 0.93
    assert not (drawn_mask.mask & (drawn_mask.pen | drawn_mask.artefact)).any()


def test_a_large_hole_is_glass_and_a_lumen_is_tissue(drawn_mask):
    assert drawn_mask.tissue_share(1090, 950, 200) == 0
    assert drawn_mask.tissue_share(1440, 1580, 60) == 1


def test_ink_across_tissue_is_cut_out(drawn_mask):
    assert drawn_mask.tissue_share(3075, 2350, 80) == 0
    assert drawn_mask.tissue_share(2700, 2350, 80) == 1


def test_without_pen_removal_ink_is_tissue(drawn):
    picture = np.asarray(Image.fromarray(drawn.picture).reduce(16))
    kept = segment_picture(picture, pixel_um=PIXEL_UM, settings=SegmentationSettings(pen=False))
    green = shrunk(drawn.pen, kept.tissue.shape)[:50]
    assert kept.tissue[:50][green].mean() > 0.9
    assert not kept.pen.any()


def test_area(drawn, drawn_mask):
    assert drawn_mask.area_mm2 == pytest.approx(drawn.tissue.sum() * 0.25 / 1e6, rel=0.03)


def test_labelled_windows_of_the_real_slide():
    """Windows of 56 um that were labelled by eye."""
    with open_slide(REAL_DATA / "cmu_small_region.svs") as slide:
        mask = segment_tissue(slide)
    with (REAL_DATA / "cmu1_small_region_tissue.csv").open() as file:
        rows = list(csv.DictReader(file))
    x, y = (np.array([float(row[key]) for row in rows]) for key in "xy")
    share = mask.tissue_share(x, y, 112)
    background = np.array([row["label"] == "background" for row in rows])
    assert share[background].max() < 0.5  # some touch the rim
    assert (share[background] < 0.05).mean() > 0.85
    assert (share[~background] > 0.75).mean() > 0.97
    assert not mask.pen.any()  # the dye on the rim of the tissue is not a marker


def test_tissue_that_fills_the_picture(nest):
    found = segment_picture(nest, pixel_um=PIXEL_UM)
    assert otsu_threshold(np.round(ColourPlanes.of(nest).saturation * 255).astype(np.uint8)) > 80
    assert found.threshold == SegmentationSettings().highest_threshold
    assert found.tissue.mean() > 0.95


@pytest.mark.parametrize("glass", [(255, 255, 255), (243, 241, 245), (238, 236, 222), (0, 0, 0)])
def test_an_empty_slide_gives_an_empty_mask(glass):
    random = np.random.default_rng(1)
    noise = random.normal(0, 1.5, (200, 300, 3))
    found = segment_picture((glass + noise).clip(0, 255).round().astype(np.uint8), pixel_um=PIXEL_UM)
    assert not found.tissue.any()
    assert not found.pen.any() or glass == (0, 0, 0)


def test_tinted_glass_changes_nothing(nest):
    white = np.full((200, 200, 3), 250, np.uint8)
    white[50 : 50 + len(nest), 50 : 50 + nest.shape[1]] = nest
    tinted = (white * np.array([0.97, 0.96, 0.88])).astype(np.uint8)
    plain, other = (segment_picture(picture, pixel_um=PIXEL_UM).tissue for picture in (white, tinted))
    assert iou(plain, other) > 0.97
    assert np.abs(balance_glass(tinted)[:40].astype(int) - 255).max() <= 2


@pytest.mark.parametrize(
    "dyes", [(1.5, 0, 0), (0.7, 1.5, 0), (0.6, 0, 1.5), (1, 1, 0)], ids=["blue", "pink", "brown", "usual"]
)
def test_stains_are_not_taken_for_ink(nest, dyes):
    """Haematoxylin alone, much eosin, and DAB, made from the real picture by its dyes."""
    from skimage.color import hed2rgb, rgb2hed

    dye = rgb2hed(nest)
    dye[..., 2] = dye[..., 1] if dyes[2] else dye[..., 2] * 0
    picture = (hed2rgb(dye * np.array(dyes)) * 255).astype(np.uint8)
    found = segment_picture(picture, pixel_um=PIXEL_UM)
    assert found.pen.mean() < 0.01
    assert found.tissue.mean() > 0.8


def test_fibres_are_left_out(nest):
    picture = np.full((300, 300, 3), 244, np.uint8)
    picture[20 : 20 + len(nest), 20 : 20 + nest.shape[1]] = nest
    picture[10:290, 200:204] = (190, 90, 160)  # 32 um wide
    settings = SegmentationSettings(median_um=8)
    found = segment_picture(picture, pixel_um=PIXEL_UM, settings=settings)
    assert not found.tissue[:, 198:206].any()
    assert found.artefact[20:280, 200:204].all()
    assert found.tissue[30:100, 30:100].mean() > 0.95
    wide = np.zeros((60, 60), bool)
    wide[10:50, 10:18] = True
    assert not find_threads(wide, pixel_um=PIXEL_UM, max_width_um=32).any()
    assert find_threads(wide, pixel_um=PIXEL_UM, max_width_um=64)[wide].all()


def test_small_parts_go_by_area(nest):
    picture = np.full((200, 200, 3), 244, np.uint8)
    picture[20:60, 20:60] = nest[20:60, 20:60]  # 0.1 mm2
    picture[100:115, 100:115] = nest[20:35, 20:35]  # 0.014 mm2
    both = SegmentationSettings(min_area_um2=8_000)
    for settings, parts in ((SegmentationSettings(), [True, False]), (both, [True, True])):
        tissue = segment_picture(picture, pixel_um=PIXEL_UM, settings=settings).tissue
        assert [bool(tissue[30:50, 30:50].all()), bool(tissue[105:110, 105:110].any())] == parts


def test_dots_of_ink_in_the_dye_are_no_pen():
    picture = np.full((100, 100, 3), 244, np.uint8)
    picture[10:14, 10:14] = (20, 110, 70)  # 0.001 mm2
    assert not find_pen(ColourPlanes.of(picture), pixel_um=PIXEL_UM).any()
    picture[40:70, 40:70] = (20, 110, 70)  # 0.06 mm2
    assert find_pen(ColourPlanes.of(picture), pixel_um=PIXEL_UM)[40:70, 40:70].all()


@pytest.mark.parametrize("seed", range(6))
def test_otsu_is_that_of_skimage(seed):
    from skimage.filters import threshold_otsu

    random = np.random.default_rng(seed)
    parts = [
        random.normal(random.uniform(0, 255), random.uniform(2, 30), random.integers(50, 3000)) for _ in "ab"
    ]
    values = np.concatenate(parts).clip(0, 255).astype(np.uint8)
    assert otsu_threshold(values) == threshold_otsu(values)


def test_otsu_of_one_value():
    assert otsu_threshold(np.full((4, 4), 7, np.uint8)) == 7


def test_share_equals_counting_pixels():
    random = np.random.default_rng(0)
    mask = TissueMask(random.random((40, 60)) < 0.4, (3.0, 2.0))
    full = mask.mask.repeat(2, 0).repeat(3, 1)  # 80 x 180 level-0 pixels
    x, y = random.integers(-20, 180, 300), random.integers(-20, 80, 300)
    side = random.integers(1, 60, 300)
    counted = [
        full[max(0, b) : max(0, b + s), max(0, a) : max(0, a + s)].sum() / s**2
        for a, b, s in zip(x, y, side, strict=True)
    ]
    np.testing.assert_allclose(mask.tissue_share(x, y, side), counted, atol=1e-9)


def test_mask_survives_pickling_without_its_table():
    mask = TissueMask(np.ones((50, 50), bool), (8.0, 8.0), 0.5)
    assert mask.tissue_share(0, 0, 16) == 1
    copy = pickle.loads(pickle.dumps(mask))
    assert copy._integral is None
    assert copy.tissue_share(-8, 0, 16) == 0.5
    assert copy.area_mm2 == pytest.approx(50 * 50 * 16 / 1e6)


def test_mistakes_are_named():
    with pytest.raises(ConfigError, match=r"at 12 um per pixel.*at most 8"):
        SegmentationSettings(mpp=12)
    with pytest.raises(DatasetError, match=r"bool array \[H, W\], not uint8 \[3, 3\]"):
        TissueMask(np.zeros((3, 3), np.uint8), (1, 1))
