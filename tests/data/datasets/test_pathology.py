"""Slides of tiles: the forks' files, stray files, changing folders."""

import csv
import json
import logging
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from dinov2.data import make_dataset
from dinov2.data.datasets import Pathology
from dinov2.errors import DatasetError, OutputError

# As the forks define it, byte for byte.
FORK_DTYPE = np.dtype([("actual_index", "<u4"), ("dir_index", "<u4"), ("dataset_index", "<u4")])


def opened(tree, extra=None, **options):
    return Pathology(split=Pathology.Split.TRAIN, root=str(tree), extra=str(extra or tree), **options)


def write_fork_index(tree, rows, extra=None):
    extra = extra or tree
    extra.mkdir(exist_ok=True)
    np.save(extra / "entries-TRAIN.npy", np.array(rows, dtype=FORK_DTYPE))


def names(dataset):
    return [Path(dataset.get_image_path(index)).name for index in range(len(dataset))]


EXPECTED_NAMES = [
    "TCGA_patch_x_patch_5.jpeg",
    *(f"slide_a_patch_{number}.jpeg" for number in (0, 3, 99, 100)),
    *(f"slide_b_patch_{number}.jpeg" for number in (2, 7, 10)),
]


def test_dump_and_read(tile_tree):
    dataset = opened(tile_tree, extra=tile_tree / "new" / "extra", sshid="13")
    dataset.dump_extra()
    assert names(dataset) == EXPECTED_NAMES
    for index in range(len(dataset)):
        image, target = dataset[index]
        assert image.size == (96, 96)
        assert target is None


def test_dumped_index_is_the_forks_format(tile_tree):
    opened(tile_tree).dump_extra()
    entries = np.load(tile_tree / "entries-TRAIN.npy")
    assert entries.dtype == FORK_DTYPE
    slides = sorted((tile_tree / "patches").iterdir())
    by_hand = []
    for number, slide_number, _ in entries.tolist():
        slide = slides[slide_number]
        by_hand.append(slide / f"{slide.name}_patch_{number}.jpeg")
    assert len(set(by_hand)) == 8
    assert all(path.is_file() for path in by_hand)
    assert not entries["dataset_index"].any()


def test_reads_an_index_written_by_a_fork(tile_tree):
    """The order and any choice of rows are the index's own."""
    write_fork_index(tile_tree, [(7, 2, 0), (99, 1, 0), (5, 0, 0), (0, 1, 0)])
    dataset = make_dataset(dataset_str=f"Pathology:split=TRAIN:root={tile_tree}:extra={tile_tree}:sshid=13")
    assert names(dataset) == [
        "slide_b_patch_7.jpeg",
        "slide_a_patch_99.jpeg",
        "TCGA_patch_x_patch_5.jpeg",
        "slide_a_patch_0.jpeg",
    ]
    assert isinstance(dataset._entries.get(), np.memmap)


def test_several_patches_folders(tile_tree, encoded):
    second = tile_tree / "second" / "other_slide"
    second.mkdir(parents=True)
    (second / "other_slide_patch_4.jpeg").write_bytes(encoded[0])
    with (tile_tree / "entry.csv").open("a") as file:
        file.write(f"more,{second.parent}\n")
    dataset = opened(tile_tree)
    dataset.dump_extra()
    assert names(dataset) == [*EXPECTED_NAMES, "other_slide_patch_4.jpeg"]
    assert dataset[8][0].size == (96, 96)


def test_stray_files_are_left_out_and_counted(tile_tree, encoded, caplog):
    slide = tile_tree / "patches" / "slide_a"
    for stray in (
        "thumbnail.png",
        "slide_a_patch_7.jpg",
        "slide_a_patch_007.jpeg",
        "slide_b_patch_1.jpeg",
        "notes",
    ):
        (slide / stray).write_bytes(encoded[0])
    (slide / "slide_a_patch_.jpeg").write_bytes(encoded[0])
    (tile_tree / "patches" / "list.txt").write_text("no slide")
    dataset = opened(tile_tree)
    with caplog.at_level(logging.WARNING, logger="dinov2"):
        dataset.dump_extra()
    assert names(dataset) == EXPECTED_NAMES
    assert "7 files are no tiles" in caplog.text
    assert "5: the name is not <slide>_patch_<number>(.jpeg|.jpg|.png)" in caplog.text
    with (tile_tree / "skipped-TRAIN.csv").open(newline="") as file:
        reasons = {Path(row["path"]).name: row["reason"] for row in csv.DictReader(file)}
    assert reasons["slide_a_patch_7.jpg"] == "most tiles of its slide end in .jpeg"
    assert reasons["list.txt"] == "it is no folder"
    assert len(reasons) == 7
    index = tile_tree / "entries-TRAIN.npy"
    assert index.stat().st_size == np.load(index, mmap_mode="r").offset + 12 * 8


def test_only_other_extensions_is_said(tile_tree):
    for tile in tile_tree.rglob("*.jpeg"):
        tile.rename(tile.with_suffix(".tif"))
    with pytest.raises(
        DatasetError, match=r"finds no tile .*_patch_<number>\(.jpeg\|.jpg\|.png\) .*8 .tif: check entry.csv"
    ):
        opened(tile_tree).dump_extra()
    assert not list(tile_tree.glob("*entries*"))


def test_a_dump_that_finds_nothing_leaves_the_old_index(tile_tree):
    dataset = opened(tile_tree)
    dataset.dump_extra()
    before = (tile_tree / "entries-TRAIN.npy").read_bytes()
    for tile in tile_tree.rglob("*.jpeg"):
        tile.unlink()
    with pytest.raises(DatasetError, match="finds no tile"):
        dataset.dump_extra()
    assert (tile_tree / "entries-TRAIN.npy").read_bytes() == before
    assert not list(tile_tree.glob(".*.tmp"))
    assert not list(tile_tree.glob("*.lock"))


def test_other_suffixes(tile_tree, tiles):
    """A suffix per slide is kept; an index of .jpeg alone has no word of it."""
    opened(tile_tree).dump_extra()
    assert set(json.loads((tile_tree / "slides-TRAIN.json").read_text())) == {"entries", "slides"}
    for suffix in ("png", "jpg"):
        slide = tile_tree / "patches" / f"slide_{suffix}"
        slide.mkdir()
        for number, tile in enumerate(tiles[:3]):
            tile.save(slide / f"slide_{suffix}_patch_{number}.{suffix}")
    (tile_tree / "patches" / "empty").mkdir()
    opened(tile_tree).dump_extra()
    dataset = opened(tile_tree)
    assert names(dataset) == [
        *EXPECTED_NAMES,
        *(f"slide_jpg_patch_{number}.jpg" for number in range(3)),
        *(f"slide_png_patch_{number}.png" for number in range(3)),
    ]
    assert dataset[13][0].tobytes() == tiles[2].tobytes()
    assert names(pickle.loads(pickle.dumps(dataset)))[-1] == "slide_png_patch_2.png"


def test_rows_and_names_fit_at_any_moment_of_a_rebuild(tile_tree):
    """What a kill between the last renames leaves: each of the two states opens as what its rows say."""
    opened(tile_tree).dump_extra()
    old = {name: (tile_tree / name).read_bytes() for name in ("entries-TRAIN.npy", "slides-TRAIN.json")}
    new_slide = tile_tree / "patches" / "a_new_one"
    new_slide.mkdir()
    tile = (tile_tree / "patches/slide_a/slide_a_patch_0.jpeg").read_bytes()
    (new_slide / "a_new_one_patch_4.jpeg").write_bytes(tile)
    opened(tile_tree).dump_extra()
    new_names = ["TCGA_patch_x_patch_5.jpeg", "a_new_one_patch_4.jpeg", *EXPECTED_NAMES[1:]]
    assert names(opened(tile_tree)) == new_names
    (tile_tree / "slides-TRAIN.json").rename(tile_tree / "slides-TRAIN.next.json")
    (tile_tree / "slides-TRAIN.json").write_bytes(old["slides-TRAIN.json"])
    assert names(opened(tile_tree)) == new_names
    (tile_tree / "entries-TRAIN.npy").write_bytes(old["entries-TRAIN.npy"])
    assert names(opened(tile_tree)) == EXPECTED_NAMES


def test_a_pickle_does_not_grow_with_the_slides(tile_tree):
    opened(tile_tree).dump_extra()
    dataset = opened(tile_tree)
    assert len(dataset) == 8
    before = len(pickle.dumps(dataset))
    for number in range(300):
        (tile_tree / "patches" / f"another_slide_{number:05d}").mkdir()
    dataset.dump_extra()
    assert len(dataset) == 8
    # Time and number of the index's file may take some bytes more or less.
    assert abs(len(pickle.dumps(dataset)) - before) < 32


def test_folders_are_listed_once(tile_tree, monkeypatch):
    write_fork_index(tile_tree, [(7, 2, 0), (99, 1, 0)])
    listed = []
    listdir = os.listdir
    monkeypatch.setattr(os, "listdir", lambda folder: listed.append(folder) or listdir(folder))
    dataset = opened(tile_tree)
    assert len(dataset) == 2
    for _ in range(3):
        names(dataset)
    assert listed == [str(tile_tree / "patches")]


def test_a_new_slide_folder_does_not_shift_a_dumped_index(tile_tree):
    opened(tile_tree).dump_extra()
    (tile_tree / "patches" / "a_new_one").mkdir()
    dataset = opened(tile_tree)
    assert names(dataset) == EXPECTED_NAMES
    assert dataset[0][0].size == (96, 96)


def test_names_of_another_index_are_not_used(tile_tree, caplog):
    opened(tile_tree).dump_extra()
    write_fork_index(tile_tree, [(7, 2, 0)])
    names_path = tile_tree / "slides-TRAIN.json"
    content = json.loads(names_path.read_text())
    names_path.write_text(json.dumps({**content, "slides": [["x", "y", "z"]]}))
    with caplog.at_level(logging.WARNING, logger="dinov2"):
        assert names(opened(tile_tree)) == ["slide_b_patch_7.jpeg"]
    assert "another index" in caplog.text


def test_an_entry_csv_with_another_number_of_folders(tile_tree):
    opened(tile_tree).dump_extra()
    with (tile_tree / "entry.csv").open("a") as file:
        file.write(f"more,{tile_tree}\n")
    with pytest.raises(
        DatasetError, match="lists 2 folders, but the index .* was built over 1: build it again"
    ):
        len(opened(tile_tree))


def test_names_that_are_no_text(tile_tree, encoded):
    slide = os.fsdecode(b"lame_\xff\xe9")
    folder = tile_tree / "patches" / slide
    folder.mkdir()
    (folder / f"{slide}_patch_1.jpeg").write_bytes(encoded[0])
    opened(tile_tree).dump_extra()
    dataset = opened(tile_tree)
    assert f"{slide}_patch_1.jpeg" in names(dataset)
    assert sum(image is not None for image, _ in (dataset[i] for i in range(len(dataset)))) == 9


def test_pickles_without_its_index(tile_tree):
    dataset = opened(tile_tree)
    dataset.dump_extra()
    assert len(dataset) == 8
    data = pickle.dumps(dataset)
    assert dataset._entries.get().tobytes() not in data
    assert names(pickle.loads(data)) == EXPECTED_NAMES


def add_slide(tile_tree, encoded, name):
    (tile_tree / "patches" / name).mkdir()
    (tile_tree / "patches" / name / f"{name}_patch_0.jpeg").write_bytes(encoded[0])


def test_a_worker_refuses_an_index_that_was_rebuilt_while_the_run_started(tile_tree, encoded):
    opened(tile_tree).dump_extra()
    dataset = opened(tile_tree)
    assert len(dataset) == 8
    for_worker = pickle.dumps(dataset)
    add_slide(tile_tree, encoded, "AAA_first")
    opened(tile_tree).dump_extra()
    with pytest.raises(DatasetError, match="was rebuilt since this run opened it: start again"):
        pickle.loads(for_worker)[0]
    assert names(dataset) == EXPECTED_NAMES
    assert names(opened(tile_tree))[0] == "AAA_first_patch_0.jpeg"


def test_slide_names_of_a_later_index_are_not_used(tile_tree, encoded):
    """The rows are mapped, then the index is built again, then the names are read."""
    opened(tile_tree).dump_extra()
    dataset = opened(tile_tree)
    dataset._entries.get()
    add_slide(tile_tree, encoded, "AAA_first")
    opened(tile_tree).dump_extra()
    with pytest.raises(DatasetError, match="was rebuilt since this run opened it"):
        dataset.get_image_path(0)


def test_junk_rows_of_a_fork_are_found_at_once(tile_tree):
    write_fork_index(tile_tree, [(7, 2, 0), (115756909, 21942, 20)])
    with pytest.raises(DatasetError, match=r"tile 1 .* slide 21942 .* build it again"):
        make_dataset(dataset_str=f"Pathology:split=TRAIN:root={tile_tree}:extra={tile_tree}:sshid=1")


@pytest.mark.parametrize("content", [b"", b"not an index", b"\x93NUMPY\x01\x00"])
def test_an_index_that_is_none(tile_tree, content):
    (tile_tree / "entries-TRAIN.npy").write_bytes(content)
    with pytest.raises(DatasetError, match=r"entries-TRAIN.npy.*python -m dinov2.data.index --root"):
        len(opened(tile_tree))


def test_an_index_of_no_rows(tile_tree):
    write_fork_index(tile_tree, [])
    with pytest.raises(DatasetError, match="empty"):
        make_dataset(dataset_str=f"Pathology:split=train:root={tile_tree}:extra={tile_tree}")


def test_an_array_of_another_kind(tile_tree):
    np.save(tile_tree / "entries-TRAIN.npy", np.zeros(4))
    with pytest.raises(DatasetError, match="lacks actual_index, dataset_index, dir_index"):
        len(opened(tile_tree))


def test_missing_index_tells_how_to_build_it(tile_tree):
    expected = f"python -m dinov2.data.index --root {tile_tree} --extra {tile_tree} --sshid 13"
    with pytest.raises(DatasetError, match=expected):
        make_dataset(dataset_str=f"Pathology:split=TRAIN:root={tile_tree}:extra={tile_tree}:sshid=13")


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("path\n/x\n", "patches_path is needed"),
        ("patches_path\n", "lists no patches folder"),
        ("patches_path\n/none/such\n", "/none/such"),
        ("name,patches_path\na,\nb,/\n", "line 2 of .* has nothing below patches_path"),
        ("", "patches_path is needed"),
    ],
)
def test_wrong_entry_csv(tile_tree, content, word):
    (tile_tree / "entry.csv").write_text(content)
    with pytest.raises(DatasetError, match=word):
        opened(tile_tree)


def test_extra_folder_that_can_not_be_written(tile_tree):
    (tile_tree / "file").write_text("")
    with pytest.raises(OutputError, match="can not write"):
        opened(tile_tree, extra=tile_tree / "file" / "extra").dump_extra()


@pytest.mark.parametrize("step", ["dump", "read"])
def test_path_map_in_dump_and_read(tile_tree, step):
    (tile_tree / "entry.csv").write_text("patches_path\n/data/of/another/host/\n")
    path_map = f"/data/of/another/host={tile_tree / 'patches'}"
    dataset = opened(tile_tree, path_map=path_map)
    if step == "dump":
        dataset.dump_extra()
    else:
        write_fork_index(tile_tree, [(5, 0, 0)])
    text = f"Pathology:split=TRAIN:root={tile_tree}:extra={tile_tree}:path_map={path_map}"
    assert make_dataset(dataset_str=text)[0][0].size == (96, 96)


def test_sshid_448_takes_the_larger_tiles(tmp_path, encoded):
    folder = tmp_path / "40x_448px_0px_overlap" / "slide"
    folder.mkdir(parents=True)
    (folder / "slide_patch_0.jpeg").write_bytes(encoded[0])
    (tmp_path / "entry.csv").write_text(f"patches_path\n{tmp_path}/20x_224px_0px_overlap\n")
    dataset = opened(tmp_path, sshid="448")
    dataset.dump_extra()
    assert "/40x_448px_0px_overlap/slide/slide_patch_0.jpeg" in dataset.get_image_path(0)
    assert dataset[0][0].size == (96, 96)


def test_no_targets(tile_tree):
    dataset = opened(tile_tree)
    assert dataset.get_target(0) is None
    with pytest.raises(DatasetError, match="Pathology has no labels"):
        dataset.get_targets()


def test_tiles_made_anew_after_the_index_are_told(tile_tree, caplog):
    opened(tile_tree).dump_extra()
    assert len(opened(tile_tree)) == 8
    assert "older than the tiles" not in caplog.text
    index = tile_tree / "entries-TRAIN.npy"
    later = index.stat().st_mtime + 60
    os.utime(tile_tree / "patches" / "slide_a", (later, later))
    for _ in range(2):
        len(opened(tile_tree))
    told = [record.getMessage() for record in caplog.records if "older than the tiles" in record.getMessage()]
    assert len(told) == 1
    assert f'"{tile_tree}/patches/slide_a" (1 of 3 ' in told[0]
    assert "build it again with python -m dinov2.data.index" in told[0]
