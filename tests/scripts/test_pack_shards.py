"""Packing datasets into shards, and reading them by the libraries the layouts come from."""

import io
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from dinov2.data import make_dataset
from dinov2.data.loaders import DATASETS
from dinov2.errors import ConfigError, DatasetError, OutputError
from scripts.pack_shards import PLAN, main, pack
from tests.conftest import REAL_DATA


@pytest.fixture(scope="session")
def encoded():
    with Image.open(REAL_DATA / "hgsc_nest.jpg") as picture:
        tiles = [picture.crop((x, 0, x + 64, 64)).convert("RGB") for x in range(0, 640, 64)]
    files = []
    for number, tile in enumerate(tiles):
        buffer = io.BytesIO()
        tile.save(buffer, ("JPEG", "PNG", "TIFF")[number % 3])
        files.append(buffer.getvalue())
    return files


@pytest.fixture
def classes(tmp_path, encoded):
    for number, data in enumerate(encoded):
        folder = tmp_path / "classes" / ("tumour" if number % 4 else "stroma")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"slide.1_{number}.{('jpg', 'png', 'tif')[number % 3]}").write_bytes(data)
    return tmp_path / "classes"


@pytest.mark.parametrize("kind", ["webdataset", "parquet"])
@pytest.mark.parametrize("processes", [1, 2])
def test_bytes_labels_and_order_stay(classes, tmp_path, kind, processes):
    source = make_dataset(dataset_str=f"ImageFolder:root={classes}")
    text = pack(
        f"ImageFolder:root={classes}", str(tmp_path / "out"), kind=kind, shard_size=4, processes=processes
    )
    packed = make_dataset(dataset_str=text)
    assert len(packed) == len(source) == 10
    for index in range(10):
        assert packed.get_image_data(index) == source.get_image_data(index)
        assert packed[index][1] == source[index][1]
        assert np.array_equal(np.asarray(packed[index][0]), np.asarray(source[index][0]))
    assert len(list((tmp_path / "out").glob("shard-*.*"))) == 3


def test_the_libraries_read_it(classes, tmp_path):
    source = make_dataset(dataset_str=f"ImageFolder:root={classes}")
    for kind in ("webdataset", "parquet"):
        pack(f"ImageFolder:root={classes}", str(tmp_path / kind), kind=kind, shard_size=6)
    urls = sorted(str(path) for path in (tmp_path / "webdataset").glob("*.tar"))
    samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    tables = [pq.read_table(path) for path in sorted((tmp_path / "parquet").glob("*.parquet"))]
    rows = [row for table in tables for row in table.to_pylist()]
    for index in range(10):
        data = source.get_image_data(index)
        ending = source.get_image_path(index)[-3:]
        assert samples[index][ending] == rows[index]["image"]["bytes"] == data
        assert int(samples[index]["cls"]) == rows[index]["label"] == source.get_target(index)
        assert rows[index]["image"]["path"] == source.get_image_path(index)
    assert samples[0]["__key__"].startswith("000000000_slide-1_")
    features = json.loads(tables[0].schema.metadata[b"huggingface"])["info"]["features"]
    assert features["label"]["names"] == source.classes


@pytest.mark.parametrize("kind", ["webdataset", "parquet"])
def test_an_interrupted_run_goes_on(classes, tmp_path, kind):
    """The shards come out the same, and those that were there are not written again."""
    text = f"ImageFolder:root={classes}"
    pack(text, str(tmp_path / "whole"), kind=kind, shard_size=3)
    pack(text, str(tmp_path / "parts"), kind=kind, shard_size=3)
    shards = sorted((tmp_path / "parts").glob("shard-*"))
    kept = shards[0].stat().st_mtime_ns
    shards[1].unlink()
    (tmp_path / "parts" / ".shard-000001.tar.x.tmp").write_bytes(b"half a shard")
    pack(text, str(tmp_path / "parts"), kind=kind, shard_size=3)
    assert shards[0].stat().st_mtime_ns == kept
    for shard in shards:
        assert shard.read_bytes() == (tmp_path / "whole" / shard.name).read_bytes()


def test_another_plan_is_refused(classes, tmp_path):
    pack(f"ImageFolder:root={classes}", str(tmp_path / "out"), kind="webdataset", shard_size=4)
    with pytest.raises(ConfigError, match=f"another shard_size, see .*{PLAN}"):
        pack(f"ImageFolder:root={classes}", str(tmp_path / "out"), kind="webdataset", shard_size=5)


def test_a_stray_shard_is_noticed(classes, tmp_path):
    pack(f"ImageFolder:root={classes}", str(tmp_path / "out"), kind="webdataset", shard_size=4)
    shard = next((tmp_path / "out").glob("*.tar"))
    (tmp_path / "out" / "other.tar").write_bytes(shard.read_bytes())
    with pytest.raises(OutputError, match="holds 14 images, but 10 less 0"):
        pack(f"ImageFolder:root={classes}", str(tmp_path / "out"), kind="webdataset", shard_size=4)


@pytest.mark.parametrize("kind", ["webdataset", "parquet"])
def test_broken_images(classes, tmp_path, kind):
    broken = sorted((classes / "tumour").iterdir())[2]
    broken.write_bytes(b"no image")
    text, output = f"ImageFolder:root={classes}", str(tmp_path / "out")
    with pytest.raises(DatasetError, match=f"image 5 .*{broken.name}.*--skip-broken"):
        pack(text, output, kind=kind, shard_size=4)
    assert not list((tmp_path / "out").glob("*000001*")), "a shard takes its name when it is complete"
    packed = pack(text, output, kind=kind, shard_size=4, skip_broken=True)
    assert len(make_dataset(dataset_str=packed)) == 9
    assert broken.name in (tmp_path / "out" / "skipped.tsv").read_text()
    pack(text, output, kind=kind, shard_size=4, skip_broken=True)


def test_a_mixture_without_labels(classes, tmp_path, encoded):
    slide = tmp_path / "tiles" / "s"
    slide.mkdir(parents=True)
    for number in range(3):
        (slide / f"s_patch_{number}.jpeg").write_bytes(encoded[0])
    (tmp_path / "entry.csv").write_text(f"patches_path\n{tmp_path / 'tiles'}\n")
    tiles = f"Pathology:split=TRAIN:root={tmp_path}:extra={tmp_path}"
    DATASETS["Pathology"](split="TRAIN", root=str(tmp_path), extra=str(tmp_path)).dump_extra()
    text = pack(f"{tiles}+{tiles}", str(tmp_path / "out"), kind="webdataset", shard_size=100)
    assert text == f"WebDataset:root={tmp_path}/out"
    assert len(make_dataset(dataset_str=text)) == 6
    with pytest.raises(ConfigError, match="pack its parts"):
        pack(f"2*{tiles}+{tiles}", str(tmp_path / "more"), kind="webdataset", shard_size=100)


def test_the_command(classes, tmp_path, capsys):
    arguments = ["--dataset", f"ImageFolder:root={classes}", "--output", str(tmp_path / "o+NCTCRC")]
    main([*arguments, "--format", "parquet", "--shard-size", "4"])
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "10 images in 3 shards, each read back and compared; 0 left out"
    assert len(make_dataset(dataset_str=said[1])) == 10
    with pytest.raises(ConfigError, match="--shard-size is 0"):
        main([*arguments, "--shard-size", "0"])


def test_where_the_recorded_folders_lie_here(classes, tmp_path):
    arguments = ["--dataset", "ImageFolder:root=/recorded/classes", "--output", str(tmp_path / "out")]
    main([*arguments, "--path-map", f"/recorded={tmp_path}"])
    assert len(make_dataset(dataset_str=f"WebDataset:root={tmp_path / 'out'}")) == 10
    with pytest.raises(DatasetError, match="/recorded/classes"):
        main(arguments)
