"""Maps of attention: ranks, pictures and GeoJSON."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2.errors import ConfigError, DatasetError
from dinov2.eval.report.collect import collect
from dinov2.eval.slides import heatmap
from dinov2.eval.slides.aggregators import recipe_of
from dinov2.eval.slides.models import save_model

SIDE = 32


def write_bag(path, attributes=True, coords=True, encoder=None, size=None):
    h5py = pytest.importorskip("h5py")
    corners = np.array([(x, y) for y in range(0, 128, SIDE) for x in range(0, 160, SIDE)])
    features = np.random.default_rng(0).normal(size=(len(corners), 6)).astype(np.float32)
    with h5py.File(path, "w") as file:
        file["features"] = features
        if encoder:
            file["features"].attrs["encoder"] = encoder
        if coords:
            file["coords"] = corners
            if attributes:
                file["coords"].attrs["patch_size_level0"] = SIDE
            if size:
                file["coords"].attrs.update({"level0_width": size[0], "level0_height": size[1]})
    return torch.from_numpy(features), corners


def write_model(path, aggregator="abmil", width=6, encoder=""):
    torch.manual_seed(0)
    model = recipe_of(aggregator).build(width, 1).eval()
    save_model(path, model, aggregator, width, ["no", "yes"], "msi", encoder)
    return model


def run(folder, *options):
    arguments = [
        "--bag",
        folder / "s.h5",
        "--model",
        folder / "m.pt",
        "--output-dir",
        folder / "out",
        *options,
    ]
    return heatmap.main(heatmap.get_args_parser().parse_args([str(item) for item in arguments]))


def test_percentiles_are_ranks_and_equal_values_share_theirs():
    assert heatmap.percentiles(np.array([0.3, 0.1, 0.9])).tolist() == [50, 0, 100]
    assert heatmap.percentiles(np.array([2.0, 1, 2, 1, 5])).tolist() == [62.5, 12.5, 62.5, 12.5, 100]
    assert heatmap.percentiles(np.array([1.0])).tolist() == [50]


def test_the_map_of_a_bag_without_its_slide(tmp_path):
    features, corners = write_bag(tmp_path / "s.h5")
    attention = write_model(tmp_path / "m.pt")(features).attention.detach().numpy()

    picture, polygons = run(tmp_path)

    with Image.open(picture) as opened:
        pixels = np.asarray(opened)
    assert pixels.shape == (128, 160, 3)
    content = json.loads(polygons.read_text())
    assert content["type"] == "FeatureCollection" and len(content["features"]) == 20
    order = attention.argsort().argsort()
    for feature, corner, value, rank in zip(content["features"], corners, attention, order, strict=True):
        ring = np.array(feature["geometry"]["coordinates"][0])
        assert ring[0].tolist() == ring[-1].tolist() == corner.tolist()
        assert (ring.min(axis=0) == corner).all() and (ring.max(axis=0) == corner + SIDE).all()
        measured = feature["properties"]["measurements"]
        assert measured["attention"] == pytest.approx(value, rel=1e-5)
        assert measured["percentile"] == pytest.approx(100 * rank / 19)
        low = min(10 * int(measured["percentile"] // 10), 90)
        assert feature["properties"]["classification"]["name"] == f"attention {low}-{low + 10} %"
    for tile, colour in ((order.argmax(), heatmap.RAMP[-1]), (order.argmin(), heatmap.RAMP[0])):
        x, y = corners[tile]
        assert (pixels[y : y + SIDE, x : x + SIDE] == colour).all()


def test_a_report_shows_the_maps_of_several_slides(tmp_path):
    for name in ("s", "t"):
        write_bag(tmp_path / f"{name}.h5")
        write_model(tmp_path / "m.pt")
        run(tmp_path, "--bag", tmp_path / f"{name}.h5")
    shown = collect(tmp_path / "out", "run").pictures
    assert [picture.path.name for picture in shown] == ["s_attention.png", "t_attention.png"]
    assert [picture.caption.split(":")[0] for picture in shown] == [
        "Attention of m.pt over s",
        "Attention of m.pt over t",
    ]


def test_the_slide_shows_through_and_gives_the_tiles(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    pytest.importorskip("openslide")
    features, corners = write_bag(tmp_path / "s.h5")
    attention = write_model(tmp_path / "m.pt")(features).attention.detach().numpy()
    slide = np.zeros((128, 160, 3), np.uint8)
    for number, (x, y) in enumerate(corners):
        slide[y : y + SIDE, x : x + SIDE] = 10 * number
    tifffile.imwrite(tmp_path / "s.tif", slide, tile=(16, 16), photometric="rgb", compression="zlib")

    overlay, sheet, _ = run(tmp_path, "--slide", tmp_path / "s.tif", "--assume-mpp", "0.5")

    with Image.open(overlay) as opened:
        assert opened.size == (160, 128)
        x, y = (corners[attention.argmax()] + SIDE // 2).tolist()
        expected = (slide[y, x] + heatmap.RAMP[-1]) / 2
        assert np.abs(np.array(opened.getpixel((x, y))) - expected).max() <= 2
    with Image.open(sheet) as opened:
        order = (-attention).argsort()
        for row, chosen in enumerate((order[:8], order[::-1][:8])):
            for column, tile in enumerate(chosen):
                shade = opened.getpixel((column * 224 + 112, row * 224 + 112))[0]
                assert abs(shade - 10 * tile) <= 1


def test_what_has_no_map_is_refused(tmp_path):
    write_bag(tmp_path / "s.h5", attributes=False)
    write_model(tmp_path / "m.pt")
    with pytest.raises(ConfigError, match="--tile-level0"):
        run(tmp_path)
    write_model(tmp_path / "m.pt", "mean")
    with pytest.raises(ConfigError, match='"mean" has no attention'):
        run(tmp_path)
    write_model(tmp_path / "m.pt", width=7)
    with pytest.raises(DatasetError, match="the width 6, the model takes 7"):
        run(tmp_path)
    write_model(tmp_path / "m.pt")
    write_bag(tmp_path / "s.h5", coords=False)
    with pytest.raises(DatasetError, match="no coordinates"):
        run(tmp_path)


def test_the_bag_of_another_encoder_is_refused(tmp_path):
    write_bag(tmp_path / "s.h5", encoder="vit-ours")
    write_model(tmp_path / "m.pt", encoder="vit-theirs")
    with pytest.raises(DatasetError, match="of the encoder vit-ours, the model takes those of vit-theirs"):
        run(tmp_path)
    for bag, model in (("vit-ours", "vit-ours"), ("vit-ours", ""), (None, "vit-theirs")):
        write_bag(tmp_path / "s.h5", encoder=bag)
        write_model(tmp_path / "m.pt", encoder=model)
        assert len(run(tmp_path)) == 2


def test_another_slide_is_refused(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    write_bag(tmp_path / "s.h5")
    write_model(tmp_path / "m.pt")
    tifffile.imwrite(tmp_path / "s.tif", np.zeros((64, 64, 3), np.uint8), tile=(16, 16), photometric="rgb")
    with pytest.raises(DatasetError, match="lie outside"):
        run(tmp_path, "--slide", tmp_path / "s.tif", "--assume-mpp", "0.5")
    # A larger one, in which all tiles lie.
    larger = np.full((192, 256, 3), 200, np.uint8)
    tifffile.imwrite(tmp_path / "s.tif", larger, tile=(16, 16), photometric="rgb", compression="zlib")
    write_bag(tmp_path / "s.h5", size=(160, 128))
    with pytest.raises(DatasetError, match="of a slide of 160 x 128 px, .* has 256 x 192 px"):
        run(tmp_path, "--slide", tmp_path / "s.tif", "--assume-mpp", "0.5")
    write_bag(tmp_path / "s.h5", size=(256, 192))
    assert len(run(tmp_path, "--slide", tmp_path / "s.tif", "--assume-mpp", "0.5")) == 3
