"""Tar shards: written and read again by the webdataset library, and by this package in any order."""

import gzip
import json
import logging
import multiprocessing
import os
import pickle
import signal
import tarfile
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import webdataset
from torch.utils.data import DataLoader

from dinov2.data import make_dataset
from dinov2.data.datasets import WebDataset
from dinov2.errors import DatasetError, ImageReadError, OutputError
from dinov2.eval.data import make_labelled_dataset, training_labels

LABELS = ["tumour", "stroma", "tumour", "adipose", "stroma", "tumour"]


def write_shards(folder, encoded, per_shard=2):
    """Shards by the webdataset library, with a class number, a record and a thumbnail of another format."""
    folder.mkdir(parents=True, exist_ok=True)
    with webdataset.ShardWriter(f"{folder}/tiles-%03d.tar", maxcount=per_shard, verbose=0) as writer:
        for number, data in enumerate(encoded):
            record = {"tissue": LABELS[number % 6], "grade": number % 3}
            sample = {"__key__": f"slide/{number:04d}", "jpg": data, "cls": number % 4, "json": record}
            writer.write({**sample, "thumb.png": b"small"})
    return folder


@pytest.fixture
def shards(tmp_path, encoded):
    return write_shards(tmp_path / "shards", encoded[:6])


def by_library(folder):
    urls = sorted(str(path) for path in folder.glob("*.tar"))
    return list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))


def test_order_and_bytes_are_those_of_the_library(shards, encoded):
    dataset = make_dataset(dataset_str=f"WebDataset:root={shards}:label=cls")
    expected = by_library(shards)
    assert len(dataset) == len(expected) == 6
    for index in (5, 0, 3, 1, 4, 2):
        assert dataset.get_image_data(index) == expected[index]["jpg"] == encoded[index]
        assert dataset.get_target(index) == int(expected[index]["cls"])
    assert dataset.get_targets().tolist() == [0, 1, 2, 3, 0, 1]
    assert dataset[2][0].size == (96, 96)
    assert dataset[-1][1] == 1


def test_labels_of_a_field(shards):
    names = make_dataset(dataset_str=f"WebDataset:root={shards}:label=json.tissue")
    assert names.classes == ["adipose", "stroma", "tumour"]
    assert names.get_targets().tolist() == [2, 1, 2, 0, 1, 2]
    numbers = make_dataset(dataset_str=f'WebDataset:root={shards}:label="json:grade"')
    assert numbers.classes is None
    assert numbers.get_targets().tolist() == [0, 1, 2, 0, 1, 2]


def test_without_labels(shards):
    dataset = make_dataset(dataset_str=f"WebDataset:root={shards}")
    assert dataset.get_target(3) is None
    with pytest.raises(DatasetError, match="label=cls"):
        dataset.get_targets()


def test_names_that_webdataset_splits_in_its_own_way(tmp_path, encoded):
    """Folders and files with dots, capitals, names above 100 bytes, folders, files without a dot."""
    names = ["a.b/x.JPG", "a.b/x.seg.png", "README", "y.jpg", f"{'d' * 90}/{'e' * 90}.jpeg", "t\u00fc.webp"]
    with tarfile.open(tmp_path / "t.tar", "w") as archive:
        folder = tarfile.TarInfo("folder.jpg")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for number, name in enumerate(names):
            member = tarfile.TarInfo(name)
            member.size = len(encoded[number])
            archive.addfile(member, BytesIO(encoded[number]))
    dataset = WebDataset(root=str(tmp_path))
    ours = [dataset.get_image_data(i) for i in range(len(dataset))]
    library = [
        sample[key] for sample in by_library(tmp_path) for key in ("jpg", "jpeg", "webp") if key in sample
    ]
    assert ours == library == [encoded[0], encoded[3], encoded[4], encoded[5]]
    assert dataset.get_image_path(1) == f"{tmp_path}/t.tar:y.jpg"


def test_the_index_is_built_once_and_again_after_a_change(shards, encoded, caplog):
    caplog.set_level(logging.INFO, logger="dinov2")
    text = f"WebDataset:root={shards}:extra={shards.parent}/index"
    make_dataset(dataset_str=text)
    make_dataset(dataset_str=text)
    assert caplog.text.count("reading the headers of 3 shards") == 1
    before = sorted(path.name for path in (shards.parent / "index").iterdir())
    write_shards(shards, encoded[:7])
    changed = make_dataset(dataset_str=text)
    assert len(changed) == 7
    assert changed.get_image_data(6) == encoded[6]
    after = sorted(path.name for path in (shards.parent / "index").iterdir())
    assert len(before) == len(after) == 2, "the outdated index is removed, and no other file is left"
    assert before != after


def test_an_index_for_every_choice_of_labels(shards):
    for _ in range(2):
        assert make_dataset(dataset_str=f"WebDataset:root={shards}:label=cls").get_target(3) == 3
        assert make_dataset(dataset_str=f"WebDataset:root={shards}:label=json.grade").get_target(3) == 0


def test_one_shard_as_root(shards, encoded):
    for number in (0, 2, 0):
        dataset = make_dataset(dataset_str=f"WebDataset:root={shards}/tiles-00{number}.tar")
        assert [dataset.get_image_data(i) for i in range(2)] == encoded[2 * number : 2 * number + 2]


def _length(text):
    return len(make_dataset(dataset_str=text))


def test_processes_that_build_at_the_same_time(shards):
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert pool.map(_length, [f"WebDataset:root={shards}:label=cls"] * 8, chunksize=1) == [6] * 8
    left = {path.suffix for path in shards.iterdir()}
    assert left == {".tar", ".json", ".npy"}


def _die_while_writing(text):
    os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
    make_dataset(dataset_str=text)


def test_nothing_of_a_killed_process_stays(shards):
    text = f"WebDataset:root={shards}:extra={shards.parent}/index"
    process = multiprocessing.get_context("fork").Process(target=_die_while_writing, args=(text,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    index = shards.parent / "index"
    assert [path.suffix for path in index.iterdir() if path.suffix != ".lock"] == [".tmp"]
    assert len(make_dataset(dataset_str=text)) == 6
    assert {path.suffix for path in index.iterdir()} == {".json", ".npy"}


def test_a_folder_that_can_not_be_written(shards, monkeypatch):
    blocked = shards.parent / "file"
    blocked.write_text("")
    with pytest.raises(OutputError, match="extra="):
        make_dataset(dataset_str=f"WebDataset:root={shards}:extra={blocked}/index")


def open_shards():
    links = [os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()]
    return [link for link in links if link.endswith(".tar")]


def test_few_files_stay_open_and_none_after(shards, encoded):
    dataset = WebDataset(root=str(shards), open_files=2)
    for index in np.random.default_rng(0).integers(0, 6, 200).tolist():
        assert dataset.get_image_data(index) == encoded[index]
        assert len(open_shards()) <= 2
    copy = pickle.loads(pickle.dumps(dataset))
    assert len(open_shards()) == 2
    assert copy.get_image_data(5) == encoded[5]
    del dataset, copy
    assert open_shards() == []


def _files_of_child(dataset, results):
    before = len(dataset._files)
    data = [dataset.get_image_data(i) for i in range(6)]
    results.put((before, len(open_shards()), data))


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_a_child_opens_its_own_files(shards, encoded, method):
    dataset = WebDataset(root=str(shards), open_files=2)
    parents_own = dataset.get_image_data(0)
    context = multiprocessing.get_context(method)
    results = context.Queue()
    child = context.Process(target=_files_of_child, args=(dataset, results))
    child.start()
    _, open_in_child, data = results.get(timeout=120)
    child.join()
    assert data == encoded[:6]
    assert open_in_child == 2, "nothing of the parent's stays open in the child"
    assert dataset.get_image_data(0) == parents_own


def _raw(dataset):
    dataset.transform = np.asarray
    return dataset


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_loader_workers_read_what_one_process_reads(shards, method):
    dataset = _raw(WebDataset(root=str(shards), label="cls"))
    alone = [dataset[i] for i in range(6)]
    loader = DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context=method)
    for (image, target), (expected, label) in zip(loader, alone, strict=True):
        assert np.array_equal(image, expected)
        assert target == label


def test_the_pickled_dataset_does_not_grow_with_the_samples(tmp_path, encoded):
    sizes = []
    for count in (2, 12):
        folder = write_shards(tmp_path / str(count), encoded[:count], per_shard=12)
        dataset = WebDataset(root=str(folder), label="cls")
        assert dataset.get_targets().tolist()
        sizes.append(len(pickle.dumps(dataset)))
    assert abs(sizes[0] - sizes[1]) < 16


def test_threads_share_the_files(shards, encoded):
    dataset = WebDataset(root=str(shards), open_files=1)
    order = np.random.default_rng(0).integers(0, 6, 400).tolist()
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(dataset.get_image_data, order)) == [encoded[index] for index in order]


def cut(path, to):
    data = path.read_bytes()
    path.write_bytes(data[:to])


@pytest.mark.parametrize("back", [512, 1024 + 200, 10000])
def test_a_shard_that_breaks_off(shards, encoded, back, caplog):
    shard = shards / "tiles-001.tar"
    size = shard.stat().st_size
    with tarfile.open(shard) as archive:
        members = {member.name: member.offset_data + member.size for member in archive}
    kept = size - 10240 - back  # behind the two blocks of zeros and the padding that end an archive
    cut(shard, kept)
    with pytest.raises(DatasetError, match=r'tiles-001.tar" breaks off.*truncated=use'):
        make_dataset(dataset_str=f"WebDataset:root={shards}")
    dataset = make_dataset(dataset_str=f"WebDataset:root={shards}:truncated=use")
    good = [n for n in (2, 3) if members[f"slide/{n:04d}.jpg"] <= kept]
    data = [dataset.get_image_data(i) for i in range(len(dataset))]
    assert data == [encoded[n] for n in (0, 1, *good, 4, 5)]
    assert f"its {len(good)} complete samples are used" in caplog.text


def test_a_break_between_image_and_label_drops_the_sample(shards):
    shard = shards / "tiles-002.tar"
    with tarfile.open(shard) as archive:
        place = archive.getmember("slide/0005.cls").offset
    cut(shard, place + 100)
    dataset = make_dataset(dataset_str=f"WebDataset:root={shards}:truncated=use:label=cls")
    assert len(dataset) == 5


def test_damage_in_the_middle_is_seen(shards):
    shard = shards / "tiles-000.tar"
    with tarfile.open(shard) as archive:
        place = archive.getmember("slide/0001.cls").offset
    data = bytearray(shard.read_bytes())
    data[place : place + 512] = os.urandom(512)
    shard.write_bytes(data)
    with pytest.raises(DatasetError, match=r"tiles-000.tar.*damaged at byte"):
        make_dataset(dataset_str=f"WebDataset:root={shards}")


def test_a_shard_cut_after_indexing_is_named(shards):
    dataset = WebDataset(root=str(shards))
    cut(shards / "tiles-002.tar", 3000)
    with pytest.raises(ImageReadError, match=r"sample 5.*tiles-002.tar.*cut off after it was indexed"):
        dataset[5]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.tar", gzip.compress(bytes(20480), mtime=0), ["gzip", "gunzip"]),
        ("a.tar", b"BZh91AY" * 100, ["bzip2"]),
        ("a.tar", b"not an archive" * 100, ["no tar archive"]),
        ("a.tar", b"", ["breaks off"]),
        ("a.tar", bytes(10240), ["no image", "image="]),
        ("a.txt", b"", ['finds no file "*.tar"', "pattern="]),
    ],
    ids=["gzip", "bzip2", "text", "empty", "no-members", "no-shard"],
)
def test_files_that_are_no_shards(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DatasetError) as caught:
        make_dataset(dataset_str=f"WebDataset:root={tmp_path}")
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (":label=txt", ["slide/0000", "no label .txt", "'cls'"]),
        (":label=json.organ", ["slide/0000", 'no field "organ"']),
        (":image=png", ["no image (png)"]),
        (":truncated=perhaps", ["error or use"]),
        (":pattern=t-{000..002}.tar", ["write * instead"]),
    ],
)
def test_wrong_options(shards, options, words):
    with pytest.raises(DatasetError) as caught:
        make_dataset(dataset_str=f"WebDataset:root={shards}{options}")
    assert all(word in str(caught.value) for word in words), caught.value


def add(archive, name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, BytesIO(data))


def test_ambiguous_samples(tmp_path, encoded, caplog):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add(archive, "1.jpg", encoded[0])
        add(archive, "1.png", encoded[1])
        add(archive, "2.json", json.dumps({"score": 0.5}).encode())
        add(archive, "3.jpg", encoded[2])
        add(archive, "3.json", json.dumps({"score": 0.5}).encode())
    with pytest.raises(DatasetError, match=r"a.tar:1.*jpg and png.*image=jpg"):
        WebDataset(root=str(tmp_path))
    assert len(WebDataset(root=str(tmp_path), image="jpg")) == 2
    assert "1 samples without an image (jpg) were left out" in caplog.text
    with pytest.raises(DatasetError, match=r"a.tar:1.*no label .json"):
        WebDataset(root=str(tmp_path), image="jpg", label="json.score")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add(archive, "3.jpg", encoded[2])
        add(archive, "3.json", json.dumps({"score": 0.5}).encode())
    with pytest.raises(DatasetError, match=r'"score".*a.tar:3.*0\.5'):
        WebDataset(root=str(tmp_path), label="json.score")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add(archive, "3.jpg", encoded[2])
        add(archive, "3.jpg", encoded[3])
    with pytest.raises(DatasetError, match=r'"3.jpg" twice in a row'):
        WebDataset(root=str(tmp_path))


def test_a_shard_that_goes_after_indexing_is_named(shards):
    dataset = WebDataset(root=str(shards))
    (shards / "tiles-002.tar").unlink()
    with pytest.raises(ImageReadError, match=r"sample 5 \(.*tiles-002.tar:byte \d+\): .*no such file"):
        dataset[5]


def test_evaluation_reads_the_labels_without_a_warning(shards, recwarn):
    text = f"WebDataset:root={shards}:label=cls"
    assert training_labels(make_labelled_dataset(text), text).tolist() == [0, 1, 2, 3, 0, 1]
    assert not [warning for warning in recwarn if "not writable" in str(warning.message)]
