"""Parquet files in the layout of Hugging Face datasets and as plain columns, written by pyarrow."""

import builtins
import json
import logging
import multiprocessing
import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from torch.utils.data import DataLoader

from dinov2.data import make_dataset
from dinov2.data.datasets import Parquet
from dinov2.errors import DatasetError, ImageReadError

NAMES = ["stroma", "tumour"]


def hugging_face_schema(names=NAMES):
    features = {
        "image": {"_type": "Image"},
        "label": {"names": names, "_type": "ClassLabel"},
    }
    fields = [
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("label", pa.int64()),
        ("stain", pa.string()),
    ]
    return pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": features}})})


def write(path, images, first=0, rows=2, schema=None, **columns):
    """A file as ``datasets`` writes it: a struct of bytes and path, and the class names in the footer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers = range(first, first + len(images))
    content = {
        "image": [{"bytes": data, "path": f"t{n}.jpg"} for n, data in zip(numbers, images, strict=True)],
        "label": [n % 2 for n in numbers],
        "stain": ["he" if n % 3 else "ihc" for n in numbers],
    }
    pq.write_table(pa.table(content | columns, schema=schema), path, row_group_size=rows)


@pytest.fixture
def files(tmp_path, encoded):
    folder = tmp_path / "files"
    write(folder / "train-00000-of-00002.parquet", encoded[:5], schema=hugging_face_schema())
    write(folder / "train-00001-of-00002.parquet", encoded[5:8], first=5, schema=hugging_face_schema())
    return folder


def test_hugging_face_layout(files, encoded):
    dataset = make_dataset(dataset_str=f"Parquet:root={files}:label=label")
    assert len(dataset) == 8
    for index in (7, 0, 4, 5, 3, 1, 6, 2):
        assert dataset.get_image_data(index) == encoded[index]
        assert dataset.get_target(index) == index % 2
    assert dataset.get_targets().tolist() == [0, 1] * 4
    assert dataset.classes == NAMES
    assert dataset[6][0].size == (96, 96)
    assert dataset[-1][1] == 1
    assert dataset.get_image_path(6) == (f"{files}/train-00001-of-00002.parquet:row group 0, row 1, t6.jpg")


def test_labels_that_are_names(files):
    dataset = make_dataset(dataset_str=f"Parquet:root={files}:label=stain")
    assert dataset.classes == ["he", "ihc"]
    assert dataset.get_targets().tolist() == [1, 0, 0, 1, 0, 0, 1, 0]


def test_without_labels(files):
    dataset = make_dataset(dataset_str=f"Parquet:root={files}")
    assert dataset.get_target(1) is None
    with pytest.raises(DatasetError, match="label=<column>"):
        dataset.get_targets()


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_a_plain_column(tmp_path, encoded, kind, compression):
    table = pa.table(
        {"png": pa.array(encoded[:6], kind), "organ": pa.array(["x", "y"] * 3).dictionary_encode()}
    )
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=4, compression=compression)
    dataset = make_dataset(dataset_str=f"Parquet:root={tmp_path}/a.parquet:image=png:label=organ")
    assert [dataset.get_image_data(i) for i in range(6)] == encoded[:6]
    assert dataset.get_targets().tolist() == [0, 1] * 3
    assert dataset.get_image_path(5) == f"{tmp_path}/a.parquet:row group 1, row 1"


def test_empty_files_and_groups_are_passed_over(tmp_path, encoded):
    write(tmp_path / "0.parquet", [], schema=hugging_face_schema())
    write(tmp_path / "1.parquet", encoded[:3], schema=hugging_face_schema())
    write(tmp_path / "2.parquet", [], schema=hugging_face_schema())
    dataset = Parquet(root=str(tmp_path), label="label")
    assert [dataset.get_image_data(i) for i in range(len(dataset))] == encoded[:3]
    (tmp_path / "1.parquet").unlink()
    with pytest.raises(DatasetError, match="no rows"):
        Parquet(root=str(tmp_path))


def test_the_cache_is_bounded_in_bytes(tmp_path):
    images = [bytes([number]) * (1 << 19) for number in range(12)]  # half a MiB each, two in a group
    write(tmp_path / "a.parquet", images)
    dataset = Parquet(root=str(tmp_path), cache_mb=3)
    order = np.random.default_rng(0).integers(0, 12, 60).tolist()
    for index in order:
        assert dataset.get_image_data(index) == images[index]
    assert len(dataset._columns) == 2
    small = Parquet(root=str(tmp_path), cache_mb=0)
    assert [small.get_image_data(index) for index in order[:4]] == [images[index] for index in order[:4]]
    assert len(small._columns) == 1


def open_files():
    links = [os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()]
    return [link for link in links if link.endswith(".parquet")]


def test_few_files_stay_open_and_none_after(tmp_path, encoded):
    for number in range(6):
        write(tmp_path / f"{number}.parquet", encoded[number : number + 1])
    dataset = Parquet(root=str(tmp_path), open_files=2, cache_mb=0)
    for index in np.random.default_rng(0).integers(0, 6, 50).tolist():
        assert dataset.get_image_data(index) == encoded[index]
        assert len(open_files()) <= 2
    assert len(open_files()) == 2
    del dataset
    assert open_files() == []


def _read_all(dataset, results):
    results.put([dataset.get_image_data(i) for i in range(8)])


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_read_what_one_process_reads(files, encoded, method):
    dataset = Parquet(root=str(files), label="label", transform=np.asarray)
    alone = [dataset[i] for i in range(8)]
    loader = DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context=method)
    for (image, target), (expected, label) in zip(loader, alone, strict=True):
        assert np.array_equal(image, expected)
        assert target == label
    context = multiprocessing.get_context(method)
    results = context.Queue()
    child = context.Process(target=_read_all, args=(dataset, results))
    child.start()
    assert results.get(timeout=120) == encoded[:8]
    child.join()


def test_pickles_without_its_rows(files):
    dataset = Parquet(root=str(files), label="label")
    before = len(pickle.dumps(dataset))
    dataset.get_image_data(3)
    dataset.get_targets().sum()
    # What the index was when it was opened comes along: an inode, a size and a time.
    assert len(pickle.dumps(dataset)) <= before + 64
    assert pickle.loads(pickle.dumps(dataset)).get_image_data(3) == dataset.get_image_data(3)


def test_an_image_that_is_not_stored(tmp_path, encoded):
    write(tmp_path / "a.parquet", [encoded[0], None])
    dataset = Parquet(root=str(tmp_path))
    with pytest.raises(ImageReadError, match=r"sample 1 .*t1.jpg.*a path alone"):
        dataset[1]


def test_large_row_groups_are_warned_of(tmp_path, caplog):
    write(tmp_path / "a.parquet", [os.urandom(1 << 20) for _ in range(9)], rows=9)
    with caplog.at_level(logging.WARNING, logger="dinov2"):
        Parquet(root=str(tmp_path))
    assert "row groups of 9 MiB" in caplog.text
    assert "pack_shards.py" in caplog.text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (":image=img", ["image=", "image.bytes, image.path, label, stain"]),
        (":image=label", ["no encoded images"]),
        (":label=lable", ['"lable" (did you mean "label"?)', "another label="]),
        (":pattern=*.pq", ['"*.pq"']),
    ],
)
def test_wrong_options(files, options, words):
    with pytest.raises(DatasetError) as caught:
        make_dataset(dataset_str=f"Parquet:root={files}{options}")
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("values", [[0.5, 1.0], [True, False], [0, None]])
def test_columns_that_are_no_labels(tmp_path, encoded, values):
    write(tmp_path / "a.parquet", encoded[:2], label=values)
    with pytest.raises(DatasetError, match='"label" of ".*a label is a whole number or a name'):
        Parquet(root=str(tmp_path), label="label")


def test_files_of_two_datasets(files, encoded):
    write(files / "x.parquet", encoded[:2], schema=hugging_face_schema(["a", "b"]))
    with pytest.raises(DatasetError, match=r"x.parquet.*other class names"):
        Parquet(root=str(files), label="label")


@pytest.mark.parametrize("keep", [0, 3, 400, -10])
def test_a_file_that_breaks_off(files, keep):
    path = files / "train-00001-of-00002.parquet"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DatasetError, match="00001-of-00002.parquet.*no complete Parquet file"):
        Parquet(root=str(files))


def test_without_pyarrow(files, monkeypatch):
    importer = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return importer(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(DatasetError, match=r"pip install -e \.\[shards\]"):
        Parquet(root=str(files))


def test_files_that_go_after_indexing_are_unreadable_images(files):
    dataset = make_dataset(dataset_str=f"Parquet:root={files}")
    gone = files / "train-00001-of-00002.parquet"
    gone.unlink()
    with pytest.raises(ImageReadError, match=r"row group \d+, row 0\): .*No such file") as caught:
        dataset[len(dataset) - 1]
    assert caught.value.path.startswith(f"{gone}:row group")


def test_a_row_without_an_image_is_an_unreadable_image(files, encoded):
    rows = [{"bytes": encoded[0], "path": "a.jpg"}, {"bytes": None, "path": "b.jpg"}]
    pq.write_table(pa.table({"image": rows}), files / "train-00002.parquet")
    dataset = make_dataset(dataset_str=f"Parquet:root={files}")
    with pytest.raises(ImageReadError, match=r"train-00002.*row 1, b\.jpg\): the row holds no image"):
        dataset[len(dataset) - 1]
