"""Tiles, coordinates and pages of one slide: the shipped SVS, a pyramid made from it, the drawn slide."""

import csv
import json

import h5py
import numpy as np
import pytest
from PIL import Image

from dinov2.data.datasets import Pathology
from dinov2.data.slides import jpeg_tiles, open_slide
from dinov2.data.slides import plan as plan_module
from dinov2.data.slides.coordinate_files import read_corners
from dinov2.data.slides.coordinates import magnification
from dinov2.data.slides.output_folder import OutputFolder
from dinov2.data.slides.plan import plan_tiles, reading_order
from dinov2.data.slides.recipe import TilingRecipe
from dinov2.data.slides.slide_list import SlideEntry
from dinov2.data.slides.tiling import tile_slide
from dinov2.data.slides.tissue import segment_tissue
from dinov2.data.slides.tissue_mask import TissueMask
from dinov2.errors import ConfigError, DatasetError
from tests.conftest import REAL_DATA
from tests.data.slides.drawn_slide import draw_slide, real_slide_picture, write_pyramid

SVS = REAL_DATA / "cmu_small_region.svs"
WHOLE_SLIDE = [[[0, 0], [2220, 0], [2220, 2967], [0, 2967]]]


@pytest.fixture(scope="module")
def pyramid(tmp_path_factory):
    """The real slide with levels, at half its pixel size, as a 40x scanner would have it."""
    path = tmp_path_factory.mktemp("pyramid") / "pyramid.tiff"
    return write_pyramid(path, real_slide_picture(), mpp=0.25, factors=(1, 2, 4))


def tile(root, path=SVS, *, name="slide", mask=None, index=True, **choices):
    output = OutputFolder(str(root))
    output.start(index=index)
    record = tile_slide(SlideEntry(name, str(path), mask=mask), TilingRecipe(**choices), output)
    output.write_record(record)
    return record


def coordinates(root, name="slide"):
    with (root / "coordinates" / f"{name}.csv").open() as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def tiled(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiled")
    return root, tile(root, min_tissue=0.5)


def test_tiles_are_what_the_slide_shows_there(tiled):
    root, record = tiled
    rows = coordinates(root)
    assert len(rows) == record["n_tiles"]
    assert 35 < record["n_tiles"] < 50
    assert [row["n"] for row in rows] == list(range(1, len(rows) + 1))
    with open_slide(SVS) as slide:
        mask = segment_tissue(slide)
        for row in rows[::5]:
            x, y = int(row["x"]), int(row["y"])
            with Image.open(root / "patches" / "slide" / f"slide_patch_{int(row['n'])}.jpeg") as file:
                assert file.size == (224, 224)
                got = np.asarray(file.convert("RGB"), int)
            error = np.abs(got - np.asarray(slide.read(x, y, 224, 0.5), int))
            assert error.mean() < 3
            assert row["tissue"] == pytest.approx(float(mask.tissue_share(x, y, 224)), abs=6e-5)
            assert row["tissue"] >= 0.5
    assert len(list((root / "patches" / "slide").iterdir())) == len(rows)


def test_tiles_are_jpeg_with_all_colour_resolution(tiled):
    with Image.open(tiled[0] / "patches" / "slide" / "slide_patch_1.jpeg") as file:
        assert [layer[1:3] for layer in file.layer] == [(1, 1)] * 3


def test_the_pathology_dataset_reads_them(tiled):
    root, record = tiled
    data = {"split": "TRAIN", "root": str(root), "extra": str(root / "extra")}
    Pathology(**data).dump_extra()
    dataset = Pathology(**data)
    assert len(dataset) == record["n_tiles"]
    image, _ = dataset[len(dataset) - 1]
    assert image.size == (224, 224)


def test_the_record_says_what_was_done(tiled):
    root, record = tiled
    stored = json.loads((root / "state" / "slide.json").read_text())
    assert stored == record
    assert stored["status"] == "done"
    assert stored["recipe"]["min_tissue"] == 0.5
    assert stored["source"].pop("modified").endswith("+00:00")
    assert stored["source"] == {"bytes": SVS.stat().st_size, "mpp": None, "mask": None}
    assert (stored["slide_mpp"], stored["level"], stored["patch_size_level0"]) == (0.499, 0, 224)
    assert 0.4 < stored["tissue_mm2"] < 0.8
    assert list((root / ".work").iterdir()) == []


def test_thumbnail_mask_and_page(tiled):
    root, record = tiled
    with Image.open(root / "thumbnails" / "slide.jpg") as thumbnail:
        assert max(thumbnail.size) == 1024
    with Image.open(root / "masks" / "slide.png") as mask:
        kept = np.asarray(mask)
        area = kept.mean() * 2220 * 2967 * 0.499**2 / 1e6
        assert area == pytest.approx(record["tissue_mm2"], abs=1e-3)
    with Image.open(root / "contact_sheets" / "slide.jpg") as page:
        pixels = np.asarray(page.convert("RGB"), int)
    green = (pixels[..., 1] > 110) & (pixels[..., 0] < 70) & (pixels[..., 2] < 110)
    blue = (pixels[..., 2] > 180) & (pixels[..., 0] < 80)
    assert green.sum() > 2000  # the outline
    assert blue.sum() > 3000  # the grid


def test_a_pyramid_gives_the_same_tissue_from_a_coarser_level(tmp_path, pyramid):
    record = tile(tmp_path, pyramid, size=112, name="pyramid")
    assert (record["level"], record["patch_size_level0"], record["slide_mpp"]) == (1, 224, 0.25)
    with open_slide(pyramid) as slide:
        row = coordinates(tmp_path, "pyramid")[20]
        shown = np.asarray(slide.read(int(row["x"]), int(row["y"]), 112, 0.5), int)
    with Image.open(tmp_path / "patches" / "pyramid" / f"pyramid_patch_{int(row['n'])}.jpeg") as file:
        assert np.abs(np.asarray(file.convert("RGB"), int) - shown).mean() < 3


def test_png_is_exact(tmp_path):
    record = tile(tmp_path, format="png", max_tiles=3, seed=1)
    assert record["n_tiles"] == 3
    with open_slide(SVS) as slide:
        for row in coordinates(tmp_path):
            shown = slide.read(int(row["x"]), int(row["y"]), 224, 0.5)
            with Image.open(tmp_path / "patches" / "slide" / f"slide_patch_{int(row['n'])}.png") as file:
                assert (np.asarray(file) == np.asarray(shown)).all()


def test_padded_edges(tmp_path):
    (tmp_path / "all.geojson").write_text(json.dumps({"type": "Polygon", "coordinates": WHOLE_SLIDE}))
    every = {"mask": str(tmp_path / "all.geojson"), "size": 448, "min_tissue": 0.0, "coords_only": True}
    dropped = tile(tmp_path / "a", edges="drop", index=False, **every)
    padded = tile(tmp_path / "b", edges="pad", index=False, **every)
    assert (dropped["n_tiles"], dropped["n_padded"]) == (4 * 6, 0)
    assert (padded["n_tiles"], padded["n_padded"]) == (5 * 7, 5 * 7 - 4 * 6)
    for row in coordinates(tmp_path / "b"):
        beyond = row["x"] + 448 > 2220 or row["y"] + 448 > 2967
        assert row["edge"] == beyond
        assert beyond or row["tissue"] > 0.97


def test_max_tiles_are_drawn_by_the_seed(tmp_path):
    drawn = {}
    for key, seed in (("a", 0), ("b", 0), ("c", 1)):
        tile(tmp_path / key, max_tiles=10, seed=seed, coords_only=True, index=False)
        drawn[key] = [row["n"] for row in coordinates(tmp_path / key)]
    assert len(drawn["a"]) == 10
    assert drawn["a"] == sorted(drawn["a"]) == drawn["b"] != drawn["c"]


def test_near_duplicates_go(tmp_path):
    """The real slide twice, side by side."""
    picture = real_slide_picture()[224:1344, 448 : 448 + 1120]
    path = write_pyramid(tmp_path / "twice.tif", np.concatenate([picture, picture], axis=1))
    all_of_it = tile(tmp_path / "all", path, name="twice")
    record = tile(tmp_path / "once", path, name="twice", near_duplicates=4)
    assert record["n_tissue"] == all_of_it["n_tiles"]
    left = [row for row in coordinates(tmp_path / "all", "twice") if row["x"] + 224 <= 1120]
    # The two halves start on the same place of the grid, 5 tiles apart.
    assert record["n_near_duplicates"] == pytest.approx(all_of_it["n_tiles"] - len(left), abs=2)
    rows = coordinates(tmp_path / "once", "twice")
    files = {path.name for path in (tmp_path / "once" / "patches" / "twice").iterdir()}
    assert files == {f"twice_patch_{int(row['n'])}.jpeg" for row in rows}
    few = tile(tmp_path / "few", path, name="twice", near_duplicates=4, max_tiles=5)
    assert few["n_tiles"] == len(list((tmp_path / "few" / "patches" / "twice").iterdir())) == 5


def test_upsampling_is_refused_unless_asked_for(tmp_path):
    with pytest.raises(DatasetError, match=r"has 0.499 um per pixel .* but 0.25 um are asked for"):
        tile(tmp_path, mpp=0.25)
    record = tile(tmp_path, mpp=0.25, allow_upsampling=True, max_tiles=2)
    assert record["patch_size_level0"] == 112
    row = coordinates(tmp_path)[0]
    with Image.open(tmp_path / "patches" / "slide" / f"slide_patch_{int(row['n'])}.jpeg") as file:
        assert file.size == (224, 224)
        small = np.asarray(file.convert("RGB").reduce(2), int)
    with open_slide(SVS) as slide:
        shown = np.asarray(slide.read(int(row["x"]), int(row["y"]), 112, 0.499), int)
    assert np.abs(small - shown).mean() < 6


def test_an_empty_slide(tmp_path):
    path = write_pyramid(tmp_path / "glass.tif", np.full((1200, 1200, 3), 243, np.uint8))
    record = tile(tmp_path / "out", path)
    assert (record["status"], record["n_tiles"], record["tissue_mm2"]) == ("empty", 0, 0)
    assert not (tmp_path / "out" / "patches" / "slide").exists()
    assert (tmp_path / "out" / "contact_sheets" / "slide.jpg").is_file()


def test_coordinates_for_trident(tmp_path, pyramid):
    record = tile(tmp_path, pyramid, name="p", size=112, overlap=16, coords_only=True, index=False)
    path = tmp_path / "20x_112px_16px_overlap" / "patches" / "p_patches.h5"
    rows = coordinates(tmp_path, "p")
    with h5py.File(path) as file:
        assert list(file) == ["coords"]
        coords = file["coords"]
        assert coords.dtype == np.int64
        assert coords[:].tolist() == [[row["x"], row["y"]] for row in rows]
        assert coords.shape == (record["n_tiles"], 2)
        attributes = dict(coords.attrs)
    expected = {
        "patch_size": 112,
        "patch_size_level0": 224,
        "overlap": 16,
        "target_magnification": 20,
        "level0_magnification": 40,
        "level0_width": 2220,
        "level0_height": 2967,
        "name": "p",
        "savetodir": ".",
    }
    ours = {"mpp": 0.5, "level0_mpp": 0.25, "edges": "drop"}
    assert isinstance(attributes.pop("mpp_source"), str)
    assert attributes == expected | ours
    with open_slide(pyramid) as slide:
        corners, side = read_corners(str(path), slide, size=112, mpp=0.5)
    assert (len(corners), side) == (record["n_tiles"], 224)


def test_coordinates_for_clam(tmp_path, pyramid):
    record = tile(tmp_path, pyramid, name="p", size=112, coords_only=True, index=False)
    assert not (tmp_path / "entry.csv").exists()
    path = tmp_path / "patches" / "p.h5"
    with h5py.File(path) as file:
        assert file["coords"].shape == (record["n_tiles"], 2)
        attributes = dict(file["coords"].attrs)
        first = file["coords"][0]
    assert (attributes["patch_size"], attributes["patch_level"], attributes["name"]) == (112, 1, "p")
    assert attributes["downsample"].tolist() == pytest.approx([2, 2], rel=1e-3)
    assert attributes["level_dim"].tolist() == attributes["downsampled_level_dim"].tolist() == [1110, 1484]
    assert attributes["save_path"] == "patches"
    # What CLAM reads with these numbers is the tile.
    import openslide

    level, side = int(attributes["patch_level"]), int(attributes["patch_size"])
    with openslide.OpenSlide(pyramid) as clam, open_slide(pyramid) as slide:
        region = clam.read_region(tuple(int(value) for value in first), level, (side, side)).convert("RGB")
        ours = np.asarray(slide.read(int(first[0]), int(first[1]), 112, 0.5), int)
        assert np.abs(np.asarray(region, int) - ours).mean() < 1  # the two decode JPEG differently
        corners, _ = read_corners(str(path), slide, size=112, mpp=0.5)
    assert len(corners) == record["n_tiles"]


@pytest.mark.parametrize(
    ("mpp", "tolerance", "power"),
    [
        (0.5, 0.02, 20),
        (0.25, 0.02, 40),
        (1.0, 0.02, 10),
        (0.4, 0.02, 25),
        (0.2325, 0.15, 40),
        (0.3, 0.02, 33.33),
    ],
)
def test_magnification(mpp, tolerance, power):
    assert magnification(mpp, tolerance=tolerance) == power


def test_every_tile_is_read_once_strip_by_strip():
    with open_slide(SVS) as slide:
        mask = TissueMask(np.ones((30, 22), bool), (2220 / 22, 2967 / 30), slide.mpp)
        plan = plan_tiles(slide, mask, TilingRecipe(size=64, min_tissue=0))
    order = reading_order(plan, 0.125)  # strips of 1024 level-0 pixels
    assert sorted(order) == list(range(len(plan)))
    x, y = plan.corners[order].T
    strip = x // 1024
    assert (np.diff(strip) >= 0).all()
    assert all((np.diff(y[strip == number]) >= 0).all() for number in set(strip))


def test_blocks_of_a_wide_slide_are_decoded_once(tmp_path, monkeypatch):
    """The cache and the strips are an eighth of their size, in place of a slide 8 times as wide."""
    path = write_pyramid(tmp_path / "drawn.tif", draw_slide().picture)
    monkeypatch.setattr(jpeg_tiles, "CACHE_BYTES", jpeg_tiles.CACHE_BYTES // 8)
    monkeypatch.setattr(plan_module, "STRIP_PIXELS", plan_module.STRIP_PIXELS // 8)
    decoded = []
    decode = jpeg_tiles._decode
    monkeypatch.setattr(jpeg_tiles, "_decode", lambda *args: decoded.append(1) or decode(*args))
    counts = {}
    for name in ("strips", "rows"):
        decoded.clear()
        with open_slide(path) as slide:
            mask = TissueMask(np.ones((21, 28), bool), (160.0, 160.0), slide.mpp)
            plan = plan_tiles(slide, mask, TilingRecipe())
            order = reading_order(plan, 1.0) if name == "strips" else range(len(plan))
            for position in order:
                slide.read(*map(int, plan.corners[position]), 224, 0.5)
        counts[name] = len(decoded)
    blocks = -(-4480 // 256) * -(-3360 // 256)
    assert counts["strips"] < 1.3 * blocks  # a strip of an eighth of the width has more rim, too
    assert counts["rows"] > 1.6 * blocks


def test_the_drawn_slide_gives_tiles_of_tissue_only(tmp_path):
    drawn = draw_slide()
    path = write_pyramid(tmp_path / "drawn.tif", drawn.picture)
    record = tile(tmp_path / "out", path, name="drawn", min_tissue=0.5)
    shares = []
    for row in coordinates(tmp_path / "out", "drawn"):
        x, y = int(row["x"]), int(row["y"])
        shares.append(drawn.tissue[y : y + 224, x : x + 224].mean())
        assert drawn.pen[y : y + 224, x : x + 224].mean() < 0.55
    assert min(shares) > 0.42
    every = TissueMask(drawn.tissue, (1.0, 1.0))
    x, y = np.meshgrid(np.arange(0, 4480 - 223, 224), np.arange(0, 3360 - 223, 224))
    assert record["n_tiles"] == pytest.approx((every.tissue_share(x, y, 224) >= 0.5).sum(), abs=6)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"format": "bmp"}, 'the format is "bmp"'),
        ({"quality": 0}, "the quality is 0"),
        ({"near_duplicates": 9}, "takes 0 to 8 of 64 bits, such as 4"),
        ({"near_duplicates": 1, "coords_only": True}, "can not be used with coords-only"),
        ({"max_tiles": 0}, "max_tiles is 0"),
        ({"overlap": 224}, "overlap of the tiles is 224"),
    ],
)
def test_mistakes_in_a_recipe(choices, message):
    with pytest.raises(ConfigError, match=message):
        TilingRecipe(**choices)
