"""Tiles cut from the real slide, in the layout the ``Pathology`` dataset reads."""

import numpy as np
import pytest
from PIL import Image

from dinov2.data import make_dataset
from dinov2.errors import DatasetError
from scripts.quickstart import tiles as tiles_module
from scripts.quickstart.tiles import make_tiles, read_slide, tile_corners, tissue_mask


def test_counts_and_layout(tiles):
    assert tiles.counts == {"cmu_small_region": 188, "hgsc_nest": 60}
    for name, count in tiles.counts.items():
        files = {path.name for path in (tiles.root / "patches" / name).iterdir()}
        assert files == {f"{name}_patch_{number}.jpeg" for number in range(1, count + 1)}
    assert (tiles.root / "extra" / "entries-TRAIN.npy").is_file()


def test_the_dataset_reads_every_tile(tiles):
    dataset = make_dataset(dataset_str=tiles.dataset_string)
    assert len(dataset) == 248
    assert {dataset[index][0].size for index in (0, 100, 187, 188, 247)} == {(224, 224)}


def test_tiles_show_the_slide(tiles):
    slide = np.asarray(read_slide(), np.float32)
    x, y = next(tile_corners(tissue_mask(slide.astype(np.uint8))))
    tile = Image.open(tiles.root / "patches" / "cmu_small_region" / "cmu_small_region_patch_1.jpeg")
    difference = np.abs(np.asarray(tile, np.float32) - slide[y : y + 224, x : x + 224])
    assert difference.mean() < 3  # JPEG at quality 95; a tile one pixel off differs by more than 10
    assert np.abs(np.asarray(tile, np.float32) - slide[y : y + 224, x + 1 : x + 225]).mean() > 10


def test_no_tile_reaches_the_test_half_of_the_carcinoma():
    picture = np.asarray(Image.open(tiles_module.CARCINOMA))[: tiles_module.CARCINOMA_TRAIN_ROWS]
    corners = list(tile_corners(tissue_mask(picture)))
    assert len(corners) == 60
    assert max(y + tiles_module.TILE_PIXELS for _, y in corners) <= 686


def test_a_second_call_uses_the_tiles_again(tiles):
    index = tiles.root / "extra" / "entries-TRAIN.npy"
    written = index.stat().st_mtime_ns
    again = make_tiles(tiles.root)
    assert again.reused
    assert again.counts == tiles.counts
    assert index.stat().st_mtime_ns == written


def test_other_settings_cut_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(tiles_module, "STRIDE_PIXELS", 224)
    make_tiles(tmp_path, carcinoma=None)
    monkeypatch.setattr(tiles_module, "MIN_TISSUE_FRACTION", 0.9)
    fewer = make_tiles(tmp_path, carcinoma=None)
    assert not fewer.reused
    assert (
        len(list((tmp_path / "patches" / "cmu_small_region").iterdir())) == fewer.counts["cmu_small_region"]
    )
    assert 0 < fewer.counts["cmu_small_region"] < 188


def test_glass_alone_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tiles_module, "read_slide", lambda path: Image.new("RGB", (500, 500), "white"))
    with pytest.raises(DatasetError, match="no tile of .* holds 40% tissue"):
        make_tiles(tmp_path, carcinoma=None)


def test_tissue_is_coloured_and_neither_glass_nor_ink():
    colours = {"pink": (230, 150, 190), "purple": (90, 50, 120), "glass": (243, 242, 243), "ink": (20, 5, 8)}
    picture = np.array([list(colours.values())], np.uint8)
    assert tissue_mask(picture)[0].tolist() == [True, True, False, False]
