"""Tiles drawn from slides: which, how often, with what labels; found once; in any worker; in the trainer."""

import csv
import json
import logging
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.ndimage  # noqa: F401 - for the forked processes, which import it anew each time otherwise
import torch
from PIL import Image

from dinov2.data import SamplerType, make_data_loader, make_dataset
from dinov2.data.dataset_string import format_dataset_string
from dinov2.data.datasets import Slides
from dinov2.data.datasets.path_map import PathMap
from dinov2.data.slides import open_slide, slide_tiles
from dinov2.data.slides.sources import slides_of_manifest
from dinov2.errors import ConfigError, DatasetError, ImageReadError
from tests.conftest import REPO
from tests.data.slides.conftest import MPP, SVS, pixels, write_tiff  # noqa: F401 - a fixture
from tests.train.conftest import TINY


@pytest.fixture(scope="session")
def one_slide(tmp_path_factory, pixels):  # noqa: F811
    """A small slide in JPEG tiles: the lower left of the real one, where there is tissue."""
    return write_tiff(tmp_path_factory.mktemp("slide") / "part.tiff", pixels[1900:2924, 200:1224])


def fill(root, one_slide):
    """The real slide, a small one, and a file that is no slide."""
    root.mkdir()
    shutil.copy(SVS, root / "b.svs")
    shutil.copy(one_slide, root / "a.tiff")
    (root / "broken.svs").write_bytes(b"no slide")
    return root


@pytest.fixture(scope="session")
def folder(tmp_path_factory, one_slide):
    """Slides that no test changes, so that their tiles are found once for all."""
    return fill(tmp_path_factory.mktemp("shared") / "slides", one_slide)


@pytest.fixture
def own_folder(tmp_path, one_slide):
    """The same for a test alone."""
    return fill(tmp_path / "slides", one_slide)


def opened(folder, **options):
    return Slides(
        root=str(folder), extra=str(folder.parent / "extra"), mpp=options.pop("mpp", MPP), **options
    )


def places(dataset):
    """(name of the slide, x, y) of every sample."""
    located = (dataset.locate(index) for index in range(len(dataset)))
    return [(Path(row.path).name, x, y) for row, x, y in located]


def write_csv(path, *rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return str(path)


def test_samples_are_the_tiles_of_the_slides(folder):
    dataset = make_dataset(
        dataset_str=format_dataset_string("Slides", root=folder, extra=folder.parent / "x", mpp=MPP, size=200)
    )
    for index in (0, 7, len(dataset) - 1):
        image, target = dataset[index]
        row, x, y = dataset.locate(index)
        with open_slide(row.path) as slide:
            assert np.array_equal(np.asarray(image), np.asarray(slide.read(x, y, 200, MPP)))
        assert target is None
        assert dataset.get_image_path(index) == f"{row.path} at x={x}, y={y}"
        assert image.mode == "RGB"


def test_the_stored_form_is_an_image_file(folder, tmp_path):
    dataset = opened(folder)
    (tmp_path / "tile.ppm").write_bytes(dataset.get_image_data(3))
    with Image.open(tmp_path / "tile.ppm") as image:
        assert np.array_equal(np.asarray(image), np.asarray(dataset[3][0]))


def test_every_slide_is_drawn_as_often(folder):
    dataset = opened(folder)
    drawn = places(dataset)
    counts = Counter(name for name, _, _ in drawn)
    tiles = {name: len({place for place in drawn if place[0] == name}) for name in counts}
    assert counts["a.tiff"] == counts["b.svs"] == max(tiles.values())
    assert tiles["a.tiff"] < tiles["b.svs"]
    # No tile of a slide is drawn twice more often than another.
    for name in counts:
        times = Counter(place for place in drawn if place[0] == name).values()
        assert max(times) - min(times) <= 1
    few = places(opened(folder, tiles_per_slide=4))
    assert Counter(name for name, _, _ in few) == {"a.tiff": 4, "b.svs": 4}
    assert len(set(few)) == 8
    of_b = [place for place in drawn if place[0] == "b.svs"]
    at = [of_b.index(place) for place in few if place[0] == "b.svs"]
    assert min(np.diff([*at, len(of_b)])) >= len(of_b) // 4  # spread over the slide


def test_every_tile_is_drawn_once(folder):
    drawn = places(opened(folder, balance="tile"))
    assert len(drawn) == len(set(drawn))
    assert set(drawn) == set(places(opened(folder)))
    capped = places(opened(folder, balance="tile", tiles_per_slide=10))
    assert len(set(capped)) == len(capped)
    assert max(Counter(name for name, _, _ in capped).values()) == 10
    assert set(capped) <= set(drawn)


def test_negative_indices_and_the_end(folder):
    dataset = opened(folder)
    assert dataset.locate(-1) == dataset.locate(len(dataset) - 1)
    with pytest.raises(IndexError):
        dataset.locate(len(dataset))


def test_tiles_are_found_once(own_folder, caplog, monkeypatch):
    with caplog.at_level(logging.INFO, logger="dinov2"):
        first = places(opened(own_folder))
    assert "finding the tiles of 3 slides" in caplog.text
    assert "LEFT OUT: 1 slides can not be read" in caplog.text
    assert "broken.svs" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="dinov2"):
        assert places(opened(own_folder)) == first
        opened(
            own_folder, balance="tile", tiles_per_slide=3, random_offset=5
        )  # another use of the same tiles
        assert "finding" not in caplog.text
        assert "LEFT OUT: 1 slides" in caplog.text
        os.utime(own_folder / "a.tiff", ns=(1, 1))
        opened(own_folder)
        # the changed slide, and the one that failed
        assert "finding the tiles of 2 slides" in caplog.text
        opened(own_folder, min_tissue=0.9)
        assert "finding the tiles of 3 slides" in caplog.text


def long_ago(extra):
    """Make the reports of a folder look as if written before."""
    for report in extra.glob("tiles-*.json"):
        os.utime(report, (0, 1_000_000_000))


def test_slides_that_failed_are_tried_again_later(own_folder, caplog, monkeypatch):
    extra = own_folder.parent / "extra"
    real = slide_tiles.open_slide

    def away(path, **options):
        if path.endswith("b.svs"):
            raise ImageReadError(f'"{path}" can not be read: the storage is away')
        return real(path, **options)

    monkeypatch.setattr(slide_tiles, "open_slide", away)
    before = opened(own_folder)
    first = places(before)
    assert {name for name, _, _ in first} == {"a.tiff"}
    monkeypatch.undo()
    assert places(opened(own_folder)) == first  # the processes of one run agree
    long_ago(extra)
    worker = pickle.dumps(before)
    with caplog.at_level(logging.INFO, logger="dinov2"):
        assert {name for name, _, _ in places(opened(own_folder))} == {"a.tiff", "b.svs"}
        assert "finding the tiles of 2 slides" in caplog.text
        caplog.clear()
        assert {name for name, _, _ in places(opened(own_folder))} == {"a.tiff", "b.svs"}
        assert "finding" not in caplog.text
    assert places(pickle.loads(worker)) == first  # a running process keeps its table
    long_ago(extra)
    tables = sorted(extra.glob("tiles-*.npy"))
    opened(own_folder)  # tried again in vain
    assert sorted(extra.glob("tiles-*.npy")) == tables


def test_a_stopped_build_goes_on(own_folder):
    opened(own_folder)
    extra = own_folder.parent / "extra"
    parts = sorted((extra / "slides").iterdir())
    assert len(parts) == 2
    for table in extra.glob("tiles-*"):
        table.unlink()
    parts[0].unlink()
    kept = parts[1].stat().st_mtime_ns
    assert len(opened(own_folder)) > 0
    assert sorted((extra / "slides").iterdir()) == parts
    assert parts[1].stat().st_mtime_ns == kept


def test_a_process_that_dies_costs_its_own_slide_alone(own_folder, caplog, monkeypatch):
    real = slide_tiles.open_slide

    def deadly(path, **options):
        if path.endswith("a.tiff"):
            os._exit(11)  # as a library that crashes
        return real(path, **options)

    monkeypatch.setattr(slide_tiles, "open_slide", deadly)
    dataset = opened(own_folder)
    assert {name for name, _, _ in places(dataset)} == {"b.svs"}
    assert "the process that read it died" in caplog.text


def open_and_die_at_the_table(folder):
    os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
    opened(folder)


def test_nothing_of_a_killed_process_stays(own_folder):
    opened(own_folder)
    extra = own_folder.parent / "extra"
    for table in extra.glob("tiles-*"):
        table.unlink()
    (own_folder / "broken.svs").unlink()  # no slide is left to look at: the process itself writes
    process = multiprocessing.get_context("fork").Process(
        target=open_and_die_at_the_table, args=(own_folder,)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    (extra / "slides" / f".{'0' * 24}.npz.{'0' * 32}.tmp").touch()  # of a killed process of the pool
    assert len(list(extra.rglob("*.tmp"))) == 2
    assert len(opened(own_folder)) > 0
    assert list(extra.rglob("*.tmp")) == []


def open_and_log(folder, log):
    logger = logging.getLogger("dinov2")
    logger.setLevel(logging.INFO)
    logger.addHandler(logging.FileHandler(log))
    opened(folder)


def test_two_processes_at_once_find_the_tiles_once(own_folder, tmp_path):
    logs = [tmp_path / "0.log", tmp_path / "1.log"]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=open_and_log, args=(own_folder, log)) for log in logs]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    texts = [log.read_text() for log in logs]
    assert sum("finding the tiles of 3 slides" in text for text in texts) == 1
    assert all("2 slides with" in text for text in texts)


def test_labels_splits_and_resolutions_of_a_manifest(folder, tmp_path):
    manifest = write_csv(
        tmp_path / "list.csv",
        ["path", "label", "split", "mpp"],
        ["b.svs", "tumour", "train", ""],
        ["a.tiff", "benign", "VAL", "0.25"],
    )
    whole = Slides(root=str(folder), manifest=manifest, extra=str(tmp_path / "x"), mpp=MPP)
    assert whole.classes == ["benign", "tumour"]
    by_name = {Path(whole.locate(i)[0].path).name: whole.get_target(i) for i in range(len(whole))}
    assert by_name == {"b.svs": 1, "a.tiff": 0}
    assert whole.get_targets().tolist() == [whole.get_target(index) for index in range(len(whole))]
    part = Slides(root=str(folder), manifest=manifest, split="val", extra=str(tmp_path / "x"), mpp=0.5)
    row = part.locate(0)[0]
    assert Path(row.path).name == "a.tiff"
    # The manifest says that its pixels are half as large: tiles take twice as many.
    assert (row.mpp, row.side, row.label) == (0.25, 448.0, 0)
    assert part[0][0].size == (224, 224)


def test_slides_that_the_manifest_leaves_out(folder, tmp_path):
    manifest = write_csv(
        tmp_path / "list.csv",
        ["path", "label", "process"],
        ["b.svs", "tumour", "1"],
        ["a.tiff", "benign", "no"],
        ["broken.svs", "", "0"],
    )
    dataset = Slides(root=str(folder), manifest=manifest, extra=str(tmp_path / "x"), mpp=MPP)
    assert {name for name, _, _ in places(dataset)} == {"b.svs"}
    assert dataset.classes == ["benign", "tumour"]  # the numbers do not change with what is left out
    assert set(dataset.get_targets().tolist()) == {1}


@pytest.mark.parametrize("how", ["train.path_map", "key"])
def test_the_path_map_reaches_keys_and_manifest(how, folder, tmp_path):
    here = tmp_path / "here"
    (here / "coords").mkdir(parents=True)
    with h5py.File(here / "coords" / "b.h5", "w") as file:
        file["coords"] = np.array([[300, 400]])
        file["coords"].attrs["patch_size_level0"] = 224
    write_csv(
        here / "list.csv", ["path", "mask"], ["/elsewhere/b.svs", "/elsewhere/m.png"], ["a.tiff", "m.png"]
    )
    paths = dict.fromkeys(("root", "extra"), "/recorded/x")
    paths |= {"manifest": "/recorded/list.csv", "coords": "/recorded/coords"}
    maps = {"/recorded": str(here), "/recorded/x": str(folder), "/elsewhere": str(folder)}
    if how == "key":  # the key goes first, and is for what the file records
        paths["path_map"] = f"/elsewhere={folder}"
        maps["/elsewhere"] = "/nowhere"
    dataset_str = format_dataset_string("Slides", **paths, mpp=MPP)
    with pytest.raises(
        DatasetError, match=r'coords of Slides is "/nowhere/coords".* coords=/recorded/coords -> "/nowhere'
    ):
        make_dataset(dataset_str=dataset_str, path_map={**maps, "/recorded/coords": "/nowhere/coords"})
    sources, _ = slides_of_manifest(
        str(here / "list.csv"), root=str(folder), path_map=PathMap.of(paths.get("path_map", maps))
    )
    assert [source.path for source in sources] == [str(folder / "b.svs"), str(folder / "a.tiff")]
    assert {source.mask for source in sources} == {str(folder / "m.png")}
    dataset = make_dataset(dataset_str=dataset_str, path_map=maps)
    assert places(dataset) == [("b.svs", 300, 400)]
    assert dataset.locate(0)[0].path == str(folder / "b.svs")


def test_masks_of_a_manifest(folder, tmp_path):
    mask = np.zeros((30, 22), np.uint8)
    mask[:, :5] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    manifest = write_csv(tmp_path / "list.csv", ["path", "mask"], ["b.svs", str(tmp_path / "mask.png")])
    dataset = Slides(
        root=str(folder),
        manifest=manifest,
        extra=str(tmp_path / "x"),
        mpp=MPP,
        min_tissue=1.0,
        balance="tile",
    )
    assert {x for _, x, _ in places(dataset)} == {0, 224}
    assert len(dataset) == 2 * 13


@pytest.mark.parametrize(
    ("name", "attributes"),
    [
        ("patches/b_patches.h5", {"patch_size": 256, "patch_size_level0": 448, "level0_magnification": 40}),
        ("patches/b.h5", {"patch_size": 448, "patch_level": 0}),
    ],
    ids=["trident", "clam"],
)
def test_coordinates_of_other_programs(name, attributes, folder, tmp_path):
    corners = [[10, 20], [300, 400], [1000, 1200]]
    for place in (name, "features/b.h5"):  # features lie under the same names
        path = tmp_path / "coords" / place
        path.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(path, "w") as file:
            file["coords"] = np.array(corners)
            file["coords"].attrs.update(attributes)
    dataset = opened(folder, coords=str(tmp_path / "coords"), mpp=2 * MPP, pattern="b.svs", balance="tile")
    assert places(dataset) == [("b.svs", x, y) for x, y in corners]
    with open_slide(str(SVS)) as slide:
        assert np.array_equal(np.asarray(dataset[1][0]), np.asarray(slide.read(300, 400, 224, 2 * MPP)))
    with pytest.raises(DatasetError, match="have 448 level-0 pixels a side.*ask for size=224 at mpp=0.998"):
        opened(folder, coords=str(tmp_path / "coords"), pattern="b.svs")


def test_coordinates_that_fit_two_slides_are_refused(own_folder, tmp_path):
    (own_folder / "deeper").mkdir()
    shutil.copy(own_folder / "a.tiff", own_folder / "deeper" / "a.tiff")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["coords"] = np.zeros((1, 2), int)
    with pytest.raises(DatasetError, match='would both take the coordinates of "a"'):
        opened(own_folder, coords=str(tmp_path), pattern="**/a.tiff")


def test_draws_may_be_moved(folder):
    fixed = opened(folder, pattern="b.svs", balance="tile")
    moving = opened(folder, pattern="b.svs", balance="tile", random_offset=40)
    row, x, y = fixed.locate(5)
    seen = {moving._moved(x, y, (0, 0, 2220, 2967), row.side) for _ in range(50)}
    assert len(seen) > 40
    assert all(abs(a - x) <= 40 and abs(b - y) <= 40 for a, b in seen)
    corner = {moving._moved(0, 2743, (0, 0, 2220, 2967), row.side) for _ in range(50)}
    assert all(a >= 0 and b + row.side <= 2967 for a, b in corner)
    assert moving[5][0].size == (224, 224)


def handles_below(folder):
    targets = [os.path.realpath(fd) for fd in Path("/proc/self/fd").iterdir()]
    return sum(target.startswith(str(folder)) for target in targets)


def test_few_slides_are_open_at_a_time(tmp_path, one_slide):
    root = tmp_path / "slides"
    root.mkdir()
    for number in range(12):
        shutil.copy(one_slide, root / f"{number}.tiff")
    dataset = opened(root, open_slides=3, tiles_per_slide=2)
    one = opened(root, open_slides=1, tiles_per_slide=2)
    one[0]
    per_slide = handles_below(root)
    del one
    for _ in range(2):
        for index in torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist():
            dataset[index]
            assert 0 < handles_below(root) <= 3 * per_slide


def test_the_copy_for_a_worker_holds_no_slides(folder):
    small, large = opened(folder, pattern="b.svs"), opened(folder)
    large[0]
    sizes = [len(pickle.dumps(dataset)) for dataset in (small, large)]
    assert abs(sizes[0] - sizes[1]) < 100
    assert max(sizes) < 3000
    again = pickle.loads(pickle.dumps(large))
    assert np.array_equal(np.asarray(again[1][0]), np.asarray(large[1][0]))


def as_tensor(image):
    return torch.from_numpy(np.asarray(image).copy())


def first_pixels(samples):
    return torch.stack([image[0, 0] for image, _ in samples])


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_read_the_same_tiles(folder, method):
    dataset = opened(folder, tiles_per_slide=6, transform=as_tensor)
    expected = first_pixels([dataset[index] for index in range(len(dataset))])
    loader = make_data_loader(
        dataset=dataset,
        batch_size=4,
        num_workers=2,
        sampler_type=SamplerType.EPOCH,
        shuffle=False,
        collate_fn=first_pixels,
        multiprocessing_context=method,
    )
    assert torch.equal(torch.cat(list(loader)), expected)


def test_a_slide_that_goes_bad_is_an_unreadable_image(own_folder):
    dataset = opened(own_folder, pattern="b.svs")
    (own_folder / "b.svs").unlink()
    with pytest.raises(ImageReadError, match=r"sample 3 \(.*b.svs at x=\d+, y=\d+\).*there is no slide file"):
        dataset[3]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"root": "nowhere"}, DatasetError, 'root of Slides is "nowhere"'),
        ({"pattern": "*.ndpi"}, DatasetError, r"finds no slide in .* \(\*.ndpi\)"),
        ({"pattern": "broken.svs"}, DatasetError, "none of the 1 slides gives a tile: 1 can not be read"),
        ({"pattern": "b.svs", "mpp": 0.1}, DatasetError, "nothing finer, but 0.1 um are asked for"),
        ({"pattern": "a.tiff", "size": 3000}, DatasetError, "1 have no tile with enough tissue"),
        ({"split": "train"}, DatasetError, "no manifest with a column split"),
        ({"balance": "slides"}, DatasetError, 'did you mean "slide"'),
        ({"tiles_per_slide": -1}, DatasetError, "tiles_per_slide of Slides is -1"),
        ({"overlap": 300}, ConfigError, "overlap of the tiles is 300"),
        ({"coords": "nowhere"}, DatasetError, 'coords of Slides is "nowhere"'),
        ({"pattern": "b.svs", "backend": "vips"}, DatasetError, "accepted are auto, openslide, tiffslide"),
    ],
)
def test_mistakes(options, error, message, folder, tmp_path):
    with pytest.raises(error, match=message):
        Slides(**{"root": str(folder), "extra": str(tmp_path / "x"), "mpp": MPP, **options})


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([["file"], ["b.svs"]], r"has the columns \['file'\]; path is needed"),
        ([["path", "lable"], ["b.svs", "1"]], 'column "lable" \\(did you mean "label"'),
        ([["path", "mpp"], ["b.svs", ""], ["", "1"]], "line 3 of .* has no path"),
        ([["path", "label"], ["b.svs", ""]], "line 2 of .* has no label"),
        ([["path", "mpp"], ["b.svs", "40x"]], 'line 2 of .* has "40x" below mpp'),
        ([["path"]], "lists no slide: add"),
        ([["path", "process"], ["b.svs", "0"]], "lists no slide but the 1 with 0 in the column process"),
        ([["path", "process"], ["b.svs", "x"]], 'has "x" below process; 1 or 0'),
    ],
)
def test_mistakes_in_a_manifest(rows, message, tmp_path):
    with pytest.raises(DatasetError, match=message):
        Slides(manifest=write_csv(tmp_path / "list.csv", *rows), extra=str(tmp_path / "x"))


@pytest.mark.slow
def test_two_processes_train_on_slides(folder, tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY)
    dataset = f"Slides:root={folder}:extra={tmp_path / 'extra'}:mpp={MPP}:size=64"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [
        str(REPO / "dinov2/train/train.py"),
        "--no-resume",
        "--config-file",
        str(tmp_path / "tiny.yaml"),
    ]
    command += [
        "--output-dir",
        str(tmp_path / "run"),
        f"train.dataset_path={dataset}",
        "optim.max_iterations=3",
    ]
    command += ["train.num_workers=1", "train.device=cpu", "evaluation.eval_period_iterations=0"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = (tmp_path / "run" / "training_metrics.json").read_text().splitlines()
    losses = [json.loads(line)["total_loss"] for line in lines]
    assert len(losses) == 3
    assert np.isfinite(losses).all()
    assert len(list((tmp_path / "extra" / "slides").iterdir())) == 2
