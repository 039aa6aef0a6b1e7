"""Images from a CSV file."""

import logging
import pickle

import pytest

from dinov2.data import make_dataset
from dinov2.data.datasets.CustomImageDataset import CustomImageDataset
from dinov2.errors import DatasetError


@pytest.fixture
def folder(tmp_path, encoded):
    for number in range(4):
        (tmp_path / f"{number}.jpg").write_bytes(encoded[number])
    return tmp_path


def write(folder, text):
    (folder / "list.csv").write_text(text)
    return str(folder / "list.csv")


def names(dataset):
    return [dataset.get_image_path(i).rsplit("/")[-1] for i in range(len(dataset))]


def test_the_forks_call(folder):
    """Full paths, a header, any root and split, no labels."""
    csv_path = write(folder, f"path\n{folder}/2.jpg\n{folder}/0.jpg\n")
    text = f"CustomImageDataset:split=TRAIN:root=/no/such/folder:extra={csv_path}"
    dataset = make_dataset(dataset_str=text, transform=lambda image: image.size)
    assert names(dataset) == ["2.jpg", "0.jpg"]
    assert dataset[0] == ((96, 96), None)
    with pytest.raises(DatasetError, match="add a column label"):
        dataset.get_targets()


def test_positional_arguments(folder):
    csv_path = write(folder, "path\n1.jpg\n")
    dataset = CustomImageDataset("TRAIN", str(folder), csv_path, lambda image: image.mode, lambda target: ())
    assert dataset[0] == ("RGB", ())


@pytest.mark.parametrize("root", ["", "{folder}"])
def test_relative_paths(folder, root):
    csv_path = write(folder, "path\n1.jpg\n\n3.jpg\n")
    dataset = CustomImageDataset(extra=csv_path, root=root.format(folder=folder))
    assert names(dataset) == ["1.jpg", "3.jpg"]
    assert dataset[1][0].size == (96, 96)


def test_a_file_without_a_header_loses_no_image(folder, caplog):
    with caplog.at_level(logging.WARNING, logger="dinov2"):
        dataset = CustomImageDataset(extra=write(folder, "0.jpg\n1.jpg\n"))
    assert names(dataset) == ["0.jpg", "1.jpg"]
    assert "no header" in caplog.text


def test_labels_and_splits(folder):
    csv_path = write(
        folder, "path,x,Label,split\n0.jpg,5,tumour,train\n1.jpg,5,fat,test\n2.jpg,5,stroma,test\n"
    )
    test = CustomImageDataset("TEST", extra=csv_path)
    assert test.classes == ["fat", "stroma", "tumour"]
    assert test.get_targets().tolist() == [0, 1]
    assert [test.get_target(i) for i in range(2)] == [0, 1]
    assert CustomImageDataset("TRAIN", extra=csv_path).get_targets().tolist() == [2]
    with pytest.raises(DatasetError, match="of the split \"VAL\"; it has .*'test', 'train'"):
        CustomImageDataset("VAL", extra=csv_path)


def test_numbers_as_labels_are_kept(folder):
    dataset = CustomImageDataset(extra=write(folder, "path,label\n0.jpg,7\n1.jpg,3\n"))
    assert dataset.get_targets().tolist() == [7, 3]
    assert pickle.loads(pickle.dumps(dataset))[1][1] == 3


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", r'list\.csv" holds nothing: give it a header line, such as path, and one image a line'),
        ("\n\n", r'list\.csv" holds nothing: give it a header line'),
        ("Path,split\n", r'list\.csv" holds only the line path,split: give it a header line'),
        ("path,label\n0.jpg,1\n1.jpg,\n", "image 2 of .* has no label"),
        ("path\nnone.jpg\n", r"there is no .*none\.jpg\"; relative paths are taken from root$"),
        ("path;label\n0.jpg;1\n", r"there is no .*0\.jpg;1.*root, and commas separate columns"),
        ("path,label\n0.jpg,1\n1.jpg,99999999999999999999\n", "has the label 99999999999999999999: number"),
    ],
)
def test_refused(folder, text, word):
    with pytest.raises(DatasetError, match=word):
        CustomImageDataset(extra=write(folder, text))


def test_a_file_that_is_no_text(folder):
    with pytest.raises(DatasetError, match="no CSV file in UTF-8"):
        CustomImageDataset(extra=str(folder / "0.jpg"))


def test_options_without_effect_are_announced(folder, caplog):
    with caplog.at_level(logging.WARNING, logger="dinov2"):
        CustomImageDataset(extra=write(folder, "path\n0.jpg\n"), test_size=0.5)
    assert "no effect" in caplog.text


@pytest.mark.parametrize("damage", ["truncated", "empty", "missing", "text"])
def test_an_unreadable_image_raises_and_is_named(folder, damage):
    dataset = CustomImageDataset(extra=write(folder, "path\n0.jpg\n1.jpg\n"))
    path = folder / "1.jpg"
    content = {"truncated": path.read_bytes()[:500], "empty": b"", "text": b"hello"}
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[damage])
    with pytest.raises(RuntimeError, match=r"can not read image for sample 1 \(.*/1\.jpg\)") as caught:
        dataset[1]
    assert isinstance(caught.value.__cause__, OSError)
