"""Bags of real slides: where their tiles lie, what their features are of, and what befalls odd slides."""

import csv
import json
import os
import re
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from dinov2.data.slides import plan
from dinov2.data.slides.recipe import TilingRecipe
from dinov2.errors import ConfigError, DatasetError, WeightsError
from dinov2.eval.slides import scouting
from dinov2.eval.slides.bags import find_bags, read_bag
from dinov2.eval.slides.extract import SKIPPED_COLUMNS, make_tile_transform, write_skipped
from dinov2.eval.slides.extraction import dealt_out, extract_all
from tests.conftest import REAL_DATA
from tests.data.slides.conftest import halved, write_tiff
from tests.data.slides.drawn_slide import draw_slide, write_pyramid
from tests.eval.slides.conftest import NORMALISATION, SVS, encoder_of, entry, features_by_hand
from tests.eval.slides.dicom import write_dicom

MPP = 0.499


def by_slide(records):
    return {record["slide"]: record for record in records}


def content(folder):
    """What an extraction has made, but for times: path -> bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.parent.name not in ("state", "logs") and path.suffix != ".csv"
    }


def windows_of(picture, corners, side):
    return [picture[y : y + side, x : x + side] for x, y in corners]


def test_features_are_those_of_windows_cut_by_hand(extraction, tiny_backbone, pixels, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "STRIP_PIXELS", 448)  # else these slides are read in the order of their tiles
    records = by_slide(extract_all(extraction(workers=2, batch_size=16)))
    assert {name: record["status"] for name, record in records.items()} == dict.fromkeys(
        ("real", "top", "middle"), "done"
    )
    bags = {name: read_bag(path) for name, path in find_bags(tmp_path / "bags").items()}
    pictures = {"real": pixels, "top": pixels[:1200, :1600], "middle": pixels[1200:2200, :1800]}
    for name, bag in bags.items():
        assert len(bag) == records[name]["n_tiles"] > 3
        expected = features_by_hand(tiny_backbone, windows_of(pictures[name], bag.coords.numpy(), 224))
        assert (bag.features - expected).abs().max() < 1e-5, name
        assert (expected[0] - expected[-1]).abs().max() > 1e-3  # they do tell tiles apart


def test_a_coarser_resolution_gives_windows_of_the_coarser_pixels(
    extraction, tiny_backbone, pixels, slides, tmp_path
):
    extract_all(extraction([entry(slides / "top.tiff")], recipe=TilingRecipe(mpp=2 * MPP, size=96)))
    bag = read_bag(tmp_path / "bags/h5_files/top.h5")
    assert bag.attributes["patch_size_level0"] == 192 and len(bag) > 3
    assert (bag.coords % 192 == 0).all()
    windows = windows_of(halved(pixels[:1200, :1600], 2), bag.coords.numpy() // 2, 96)
    assert (bag.features - features_by_hand(tiny_backbone, windows)).abs().max() < 1e-5


def test_the_mean_patch_token_stands_beside_the_cls_token(extraction, tiny_backbone, slides, tmp_path):
    only = [entry(slides / "top.tiff")]
    for pool in ("cls", "mean", "cls+mean"):
        extract_all(extraction(only, encoder=encoder_of(tiny_backbone, pool=pool), output=tmp_path / pool))
    cls, mean, both = (
        read_bag(tmp_path / pool / "h5_files/top.h5").features for pool in ("cls", "mean", "cls+mean")
    )
    assert torch.allclose(both, torch.cat([cls, mean], dim=1), atol=1e-6)
    assert (cls - mean).abs().max() > 1e-3


def test_the_real_slide_is_covered_and_its_glass_is_not(extraction, pixels, tmp_path):
    """By windows of 112 px that were labelled by eye, and by what is as pale as glass."""
    extract_all(extraction(SVS, recipe=TilingRecipe(min_tissue=0.25)))
    bag = read_bag(tmp_path / "bags/h5_files/cmu_small_region.h5")
    corners = {tuple(corner) for corner in bag.coords.tolist()}
    assert len(corners) == len(bag)
    assert all(0 <= x <= 2220 - 224 and 0 <= y <= 2967 - 224 for x, y in corners)
    labels = {}
    with (REAL_DATA / "cmu1_small_region_tissue.csv").open() as file:
        for row in csv.DictReader(file):
            x, y = int(row["x"]), int(row["y"])
            labels.setdefault((x // 224 * 224, y // 224 * 224), []).append(row["label"])
    places = {place: set(found) for place, found in labels.items() if place[1] + 224 <= 2967}
    tissue = {place for place, found in places.items() if "background" not in found}
    pale = (pixels[:2912, :2016].min(axis=2) > 215).reshape(13, 224, 9, 224).mean(axis=(1, 3))
    glass = {(int(column) * 224, int(row) * 224) for row, column in np.argwhere(pale > 0.97)}
    assert len(tissue) > 20 and tissue <= corners
    assert len(glass) > 20 and not glass & corners


def test_tiles_lie_on_drawn_tissue_and_not_on_ink(extraction, tmp_path):
    drawn = draw_slide()
    path = write_pyramid(tmp_path / "drawn.tif", drawn.picture)
    record = extract_all(extraction(path, recipe=TilingRecipe(min_tissue=0.5)))[0]
    bag = read_bag(tmp_path / "bags/h5_files/drawn.h5")
    kept = {tuple(corner) for corner in bag.coords.tolist()}
    assert record["n_tiles"] == len(kept) > 50
    missed = 0
    for y in range(0, drawn.picture.shape[0] - 223, 224):
        for x in range(0, drawn.picture.shape[1] - 223, 224):
            window = np.s_[y : y + 224, x : x + 224]
            share = drawn.tissue[window].mean()
            missed += (x, y) not in kept and share > 0.6
            assert (x, y) not in kept or share > 0.4, (x, y, share)
            assert (x, y) not in kept or drawn.pen[window].mean() < 0.6
    assert missed <= 2  # the picture the tissue was cut from has pale parts of its own
    page = Image.open(tmp_path / "bags/qc/drawn.png")
    pixels = np.asarray(page.convert("RGB")).reshape(-1, 3).astype(int)
    ink = ((pixels[:, 0] > 150) & (pixels[:, 1] < 60) & (pixels[:, 2] > 140)).sum()
    assert page.format == "PNG" and ink > 1000  # ink is coloured on the page


def test_the_file_has_the_documented_keys_and_attributes(extraction, slides, tmp_path, encoder):
    only = [entry(slides / "top.tiff")]
    extract_all(extraction(only, format_name="both", dtype="float16"))
    with h5py.File(tmp_path / "bags/h5_files/top.h5") as file:
        assert set(file) == {"features", "coords"}
        features, coords = file["features"], file["coords"]
        assert (features.dtype, coords.dtype) == (np.float16, np.int64)
        assert features.shape == (len(coords), 48) and coords.shape[1] == 2
        assert dict(features.attrs) == {"encoder": encoder.name, "name": "top", "savetodir": "."}
        assert dict(coords.attrs) == {
            "patch_size": 224,
            "patch_size_level0": 224,
            "overlap": 0,
            "target_magnification": 20,
            "level0_magnification": 20,
            "level0_width": 1600,
            "level0_height": 1200,
            "name": "top",
            "savetodir": ".",
            "mpp": 0.5,
            "level0_mpp": pytest.approx(MPP, abs=1e-4),
            "mpp_source": "openslide.mpp",
            "edges": "drop",
        }
        recipe = json.loads(file.attrs["recipe"])
        assert recipe["encoder"]["weights_sha256"] == encoder.identity["weights_sha256"]
        assert (recipe["dtype"], recipe["tiles"]["mpp"]) == ("float16", 0.5)
        assert recipe["source"]["bytes"] == (slides / "top.tiff").stat().st_size
        stored = features[:]
    assert np.array_equal(torch.load(tmp_path / "bags/pt_files/top.pt", weights_only=True), stored)


def stamps(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.parent.name == "h5_files"}


def test_finished_slides_are_passed_over_and_lost_files_made_again(extraction, tmp_path, monkeypatch):
    run = extraction()
    first = extract_all(run)
    before, made = stamps(tmp_path / "bags"), content(tmp_path / "bags")
    assert extract_all(run) == first and stamps(tmp_path / "bags") == before
    (tmp_path / "bags/h5_files/top.h5").unlink()
    extract_all(run)
    assert content(tmp_path / "bags") == made
    changed = {path.stem for path, stamp in stamps(tmp_path / "bags").items() if before[path] != stamp}
    assert changed == {"top"}


def test_another_recipe_is_refused_by_name_and_done_on_demand(extraction, slides, tmp_path):
    path = tmp_path / "top.tiff"
    path.write_bytes((slides / "top.tiff").read_bytes())
    run = extraction([entry(path)], recipe=TilingRecipe(max_tiles=3), format_name="both")
    extract_all(run)
    made = content(tmp_path / "bags")

    def tiled(**options):
        return replace(run, order=replace(run.order, recipe=TilingRecipe(max_tiles=3, **options)))

    def encoded(**options):
        return replace(run, encoder=replace(run.encoder, **options))

    others = {
        "tiles.mpp 0.5 -> 1.0": tiled(mpp=1.0),
        "tiles.min_tissue 0.25 -> 0.3": tiled(min_tissue=0.3),
        "dtype float32 -> float16": replace(run, dtype="float16"),
        "weights_sha256 .* -> 0123": encoded(identity={**run.encoder.identity, "weights_sha256": "0123"}),
        "encoder.transform .* -> other": encoded(transform_text="other"),
        "encoder.pool cls -> mean": encoded(pool="mean"),
        "format both -> h5": replace(run, format_name="h5"),
    }
    for said, other in others.items():
        with pytest.raises(ConfigError, match=said) as caught:
            extract_all(other)
        assert "--redo" in str(caught.value) and "--output-dir" in str(caught.value)
    assert content(tmp_path / "bags") == made
    assert extract_all(replace(other, redo=True))[0]["status"] == "done"
    extract_all(other)
    assert not (tmp_path / "bags/pt_files/top.pt").exists()  # nothing old is left over
    os.utime(path, (1, 1))
    with pytest.raises(ConfigError, match="slide modified .* -> 1970"):
        extract_all(other)


def test_a_slide_that_changes_while_it_is_read_counts_as_changed(extraction, slides, tmp_path, monkeypatch):
    path = tmp_path / "top.tiff"
    path.write_bytes((slides / "top.tiff").read_bytes())
    os.utime(path, (0, 0))
    run = extraction([entry(path)], recipe=TilingRecipe(max_tiles=2))
    whole = scouting._scouted

    def touching(slide, order):
        found = whole(slide, order)
        os.utime(path, (100_000, 100_000))
        return found

    with monkeypatch.context() as patched:
        patched.setattr(scouting, "_scouted", touching)
        extract_all(run)
    with h5py.File(tmp_path / "bags/h5_files/top.h5") as file:
        assert json.loads(file.attrs["recipe"])["source"]["modified"].startswith("1970-01-01")
    with pytest.raises(ConfigError, match="slide modified 1970-01-01.* -> 1970-01-02"):
        extract_all(run)


@pytest.fixture
def odd_slides(tmp_path, slides, pixels):
    """A good slide among slides that are none or give nothing."""
    folder = tmp_path / "odd"
    folder.mkdir()
    good = (slides / "top.tiff").read_bytes()
    (folder / "good.tiff").write_bytes(good)
    svs = SVS.read_bytes()
    (folder / "headless.svs").write_bytes(svs[: len(svs) // 2])
    write_tiff(folder / "truncated.tiff", pixels[:1200, :1600], levels=(1, 4))
    cut = (folder / "truncated.tiff").read_bytes()
    (folder / "truncated.tiff").write_bytes(cut[: len(cut) * 2 // 3])
    noise = np.random.default_rng(0).normal(243, 1, (900, 900, 3)).clip(0, 255).astype(np.uint8)
    write_tiff(folder / "glass.tiff", noise)
    write_tiff(folder / "dot.tiff", noise[:1, :1])
    write_tiff(folder / "scaleless.tiff", pixels[:1200, :1600], mpp=None)
    (folder / "empty.svs").touch()
    return folder


def test_slides_that_can_not_be_used_are_listed_with_the_reason(extraction, odd_slides, tmp_path):
    run = extraction(odd_slides)
    records = by_slide(extract_all(run))
    reasons = {name: (record["status"], record.get("error", "")) for name, record in records.items()}
    assert reasons["good"] == ("done", "")
    assert reasons["glass"][0] == "empty" and "none of the 16 places" in reasons["glass"][1]
    assert reasons["dot"][0] == "empty" and "the scanned area is 1 x 1 px" in reasons["dot"][1]
    failed = {
        "headless": "can not be opened",
        "truncated": "can not",
        "empty": "is empty",
        "scaleless": "does not say how large its pixels are.*--assume-mpp",
    }
    for name, words in failed.items():
        assert reasons[name][0] == "failed"
        assert f"{name}." in reasons[name][1]
        assert re.search(words, reasons[name][1]), reasons[name]
        assert "\n" not in reasons[name][1]
    write_skipped(tmp_path / "skipped.csv", records.values(), run.entries)
    with (tmp_path / "skipped.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == SKIPPED_COLUMNS
    assert {row["slide"]: (row["status"], row["reason"]) for row in rows} == {
        name: value for name, value in reasons.items() if name != "good"
    }
    assert set(find_bags(tmp_path / "bags")) == {"good"}
    # What failed is tried again, what is empty is not.
    tried = by_slide(extract_all(run))
    assert tried["glass"]["finished"] == records["glass"]["finished"]
    assert tried["headless"]["status"] == "failed"


def test_the_resolution_is_assumed_only_where_the_slide_is_silent(extraction, odd_slides, tmp_path):
    pair = [entry(odd_slides / name) for name in ("good.tiff", "scaleless.tiff")]
    records = by_slide(extract_all(extraction(pair, assumed_mpp=0.25)))
    assert [records[name]["slide_mpp"] for name in ("good", "scaleless")] == pytest.approx(
        [MPP, 0.25], abs=1e-4
    )
    bag = read_bag(tmp_path / "bags/h5_files/scaleless.h5")
    assert (bag.attributes["mpp_source"], bag.attributes["patch_size_level0"]) == ("assumed", 448)
    with pytest.raises(ConfigError, match="scaleless .assumed mpp 0.25 -> 0.5") as caught:
        extract_all(extraction(pair, assumed_mpp=0.5))
    assert "good" not in str(caught.value)


def test_a_slide_that_takes_its_process_down_does_not_touch_the_others(extraction, slides, monkeypatch):
    whole = scouting._scouted

    def fatal(slide, order):
        return os._exit(9) if slide.name == "real" else whole(slide, order)

    monkeypatch.setattr(scouting, "_scouted", fatal)
    records = by_slide(extract_all(extraction(workers=1, recipe=TilingRecipe(max_tiles=2))))
    assert {name: record["status"] for name, record in records.items()} == {
        "real": "failed",
        "top": "done",
        "middle": "done",
    }
    assert "the process that looked at it died" in records["real"]["error"]


def test_two_slides_of_one_name_are_refused(extraction, slides, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / "twice" / folder).mkdir(parents=True)
        (tmp_path / "twice" / folder / "top.tiff").touch()
    with pytest.raises(DatasetError, match='stored as "top".*a/top.tiff.*b/top.tiff'):
        extraction(tmp_path / "twice")


def test_features_that_are_not_finite_stop_the_run(extraction, tiny_backbone, slides, tmp_path):
    class Broken(torch.nn.Module):
        def forward(self, images):
            return tiny_backbone(images) * torch.tensor(float("inf"))

    broken = replace(encoder_of(tiny_backbone), model=Broken())
    with pytest.raises(WeightsError, match='tiles of "top" are not finite'):
        extract_all(extraction([entry(slides / "top.tiff")], encoder=broken))
    assert not (tmp_path / "bags/h5_files/top.h5").exists()


def test_tiffslide_serves_as_well(extraction, slides, tmp_path):
    only = [entry(slides / "top.tiff")]
    for backend in ("openslide", "tiffslide"):
        record = extract_all(extraction(only, backend=backend, output=tmp_path / backend))[0]
        assert record["backend"] == backend
        assert (
            json.loads(read_bag(tmp_path / backend / "h5_files/top.h5").attributes["recipe"])["backend"]
            == backend
        )
    # Another library is another recipe; the automatic choice is content with what is there.
    with pytest.raises(ConfigError, match="top .backend tiffslide -> openslide.*--redo"):
        extract_all(extraction(only, backend="openslide", output=tmp_path / "tiffslide"))
    for backend in ("tiffslide", "auto"):
        assert extract_all(extraction(only, backend=backend, output=tmp_path / "tiffslide")) == [record]
    first, second = (read_bag(tmp_path / name / "h5_files/top.h5") for name in ("openslide", "tiffslide"))
    assert torch.equal(first.coords, second.coords)
    assert (first.features - second.features).abs().max() < 1e-5


def test_slides_are_dealt_out_once_each_and_evenly():
    sizes = sorted(np.random.default_rng(0).integers(1, 1000, 97).tolist(), reverse=True)
    for processes in (1, 2, 3, 8):
        shares = [dealt_out(sizes, rank, processes) for rank in range(processes)]
        assert sorted(sum(shares, [])) == sorted(sizes)
        totals = [sum(share) for share in shares]
        assert max(totals) - min(totals) <= sizes[0]


def test_tiles_are_resized_for_the_model_only_on_demand():
    tile = Image.fromarray(np.random.default_rng(0).integers(0, 255, (256, 256, 3), np.uint8))
    assert make_tile_transform(256, None, **NORMALISATION)(tile).shape == (3, 256, 256)
    assert make_tile_transform(256, 224, **NORMALISATION)(tile).shape == (3, 224, 224)


@pytest.mark.parametrize("in_folder", [False, True])
def test_a_dicom_slide_is_read_by_one_of_its_files(extraction, tiny_backbone, pixels, tmp_path, in_folder):
    """A file per level, in JPEG frames; windows are cut from what OpenSlide makes of the whole level."""
    import openslide

    path = write_dicom(tmp_path / "slides" / "dicom", pixels[1000:1900, 700:1700], MPP)
    (record,) = extract_all(extraction(path.parent.parent if in_folder else path))
    name = "dicom" if in_folder else "level0"
    assert (record["status"], record["slide"], record["backend"]) == ("done", name, "openslide")
    assert record["slide_mpp"] == pytest.approx(MPP, abs=1e-4) and record["dimensions"] == [1000, 900]
    bag = read_bag(tmp_path / "bags/h5_files" / f"{name}.h5")
    with openslide.OpenSlide(str(path)) as slide:
        whole = np.asarray(slide.read_region((0, 0), 0, (1000, 900)).convert("RGB"))
    expected = features_by_hand(tiny_backbone, windows_of(whole, bag.coords.tolist(), 224))
    assert len(bag) > 4 and (bag.features - expected).abs().max() < 1e-5
