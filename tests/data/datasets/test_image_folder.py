"""Class folders and NCT-CRC."""

import logging
import pickle

import pytest

from dinov2.data import make_dataset
from dinov2.data.datasets import NCTCRC, ImageFolder
from dinov2.errors import DatasetError


@pytest.fixture
def nct_tree(tmp_path, encoded):
    for split, classes in {"NCT-CRC-HE-100K": NCTCRC.CLASSES, "CRC-VAL-HE-7K": ("ADI", "TUM")}.items():
        for number, name in enumerate(classes):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            (folder / f"{name}-{number}.tif").write_bytes(encoded[number])
    return tmp_path


def test_classes_in_the_order_of_their_names(class_tree):
    dataset = ImageFolder(root=str(class_tree))
    assert dataset.classes == ["stroma", "tumour"]
    assert dataset.get_targets().tolist() == [0, 0, 1, 1, 1]
    assert [dataset.get_target(i) for i in range(5)] == [0, 0, 1, 1, 1]
    assert [dataset.get_image_path(i).rsplit("/")[-1] for i in range(5)] == [
        *("d.jpeg", "e.jpg"),
        *("a.jpg", "c.png", "b.JPG"),
    ]
    image, target = dataset[4]
    assert image.size == (96, 96)
    assert target == 1


def test_transforms(class_tree):
    dataset = ImageFolder(root=str(class_tree), transform=lambda image: image.size, target_transform=str)
    assert dataset[3] == ((96, 96), "1")


def test_pickles(class_tree):
    copy = pickle.loads(pickle.dumps(ImageFolder(root=str(class_tree))))
    assert copy[4][1] == 1


def test_nct_crc(nct_tree):
    train = make_dataset(dataset_str=f"NCTCRC:split=TRAIN:root={nct_tree}")
    assert train.get_targets().tolist() == list(range(9))
    assert train.get_image_path(8).endswith("NCT-CRC-HE-100K/TUM/TUM-8.tif")
    assert train[0][0].size == (96, 96)


def test_nct_crc_numbers_classes_alike_in_both_splits(nct_tree, caplog):
    with caplog.at_level(logging.WARNING, logger="dinov2"):
        test = make_dataset(dataset_str=f"NCTCRC:split=val:root={nct_tree}")
    assert test.get_targets().tolist() == [0, 8]
    assert test.split is NCTCRC.Split.VAL
    assert "BACK, DEB, LYM, MUC, MUS, NORM, STR" in caplog.text


def test_nct_crc_wrong_split(nct_tree):
    with pytest.raises(DatasetError, match=r'no split "TEST".*TRAIN, VAL, TRAIN_NONORM'):
        make_dataset(dataset_str=f"NCTCRC:split=TEST:root={nct_tree}")
