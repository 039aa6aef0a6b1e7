"""ImageNet: index round trip on a small tree."""

import logging
import pickle

import numpy as np
import pytest

from dinov2.data import make_dataset
from dinov2.data.datasets import ImageNet
from dinov2.errors import DatasetError

TREE = {
    "train/n02/n02_7.JPEG": 0,
    "train/n02/n02_10.JPEG": 1,
    "train/n01/n01_3.JPEG": 2,
    "val/n01/ILSVRC2012_val_00000002.JPEG": 3,
    "val/n02/ILSVRC2012_val_00000001.JPEG": 4,
    "test/ILSVRC2012_test_00000001.JPEG": 5,
    "test/ILSVRC2012_test_00000002.JPEG": 6,
}


@pytest.fixture
def image_net(tmp_path, encoded):
    for name, number in TREE.items():
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded[number])
    (tmp_path / "root" / "labels.txt").write_text('n01,"tench, Tinca"\nn02,goldfish\n')
    return tmp_path


def dumped(tree, split, **options):
    dataset = ImageNet(split=split, root=str(tree / "root"), extra=str(tree / "extra"), **options)
    dataset.dump_extra()
    return dataset


@pytest.mark.parametrize("split", ["TRAIN", "VAL", "TEST"])
def test_every_image_is_found_again(image_net, encoded, split):
    dataset = dumped(image_net, split)
    found = {dataset.get_image_path(i): dataset.get_image_data(i) for i in range(len(dataset))}
    expected = {
        str(image_net / "root" / name): encoded[number]
        for name, number in TREE.items()
        if name.startswith(split.lower())
    }
    assert found == expected
    assert dataset[0][0].size == (96, 96)
    assert dataset.split is ImageNet.Split[split]


def test_classes(image_net):
    dataset = dumped(image_net, "TRAIN")
    assert dataset.get_targets().tolist() == [0, 1, 1]
    assert [dataset.get_target(i) for i in range(3)] == [0, 1, 1]
    assert dataset.get_class_id(2) == dataset.find_class_id(1) == "n02"
    assert dataset.get_class_name(0) == dataset.find_class_name(0) == "tench, Tinca"
    entries = np.load(image_net / "extra" / "entries-TRAIN.npy")
    assert [name for name in entries.dtype.names] == ["actual_index", "class_index", "class_id", "class_name"]
    assert entries.dtype["actual_index"] == entries.dtype["class_index"] == np.dtype("<u4")


def test_the_test_split_has_no_labels(image_net):
    dataset = dumped(image_net, "TEST", target_transform=lambda target: target)
    assert dataset.get_targets() is dataset.get_target(0) is dataset.get_class_id(0) is None
    assert dataset.get_class_name(1) is None
    assert dataset[1][1] is None


def test_a_subset_warns_only(image_net, caplog):
    with caplog.at_level(logging.WARNING, logger="dinov2"):
        dumped(image_net, "VAL")
    assert "VAL has 2 images here, 50000 in full" in caplog.text
    text = f"ImageNet:split=val:root={image_net}/root:extra={image_net}/extra"
    assert len(make_dataset(dataset_str=text)) == 2


def test_pickles_without_its_index(image_net):
    dataset = dumped(image_net, "TRAIN")
    assert dataset[0]
    assert pickle.loads(pickle.dumps(dataset))[2][1] == 1


def test_missing_labels(image_net):
    (image_net / "root" / "labels.txt").unlink()
    with pytest.raises(DatasetError, match="labels.txt"):
        dumped(image_net, "TRAIN")


def test_a_name_without_a_number(image_net, encoded):
    (image_net / "root" / "train" / "n01" / "n01_x.JPEG").write_bytes(encoded[0])
    with pytest.raises(DatasetError, match="n01_x.JPEG"):
        dumped(image_net, "TRAIN")


def test_no_images(tmp_path):
    (tmp_path / "root").mkdir()
    with pytest.raises(DatasetError, match="finds no TEST image"):
        dumped(tmp_path, "TEST")
