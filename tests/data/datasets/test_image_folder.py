"""Class folders and NCT-CRC."""

import logging
import os
import pickle
import pickletools

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


@pytest.mark.parametrize(("split", "counts"), [("TRAIN", NCTCRC.COUNTS_100K), ("VAL", NCTCRC.COUNTS_7K)])
def test_nct_crc_counts_are_compared_with_the_published_ones(nct_tree, caplog, monkeypatch, split, counts):
    assert sum(counts) == {"TRAIN": 100_000, "VAL": 7_180}[split]
    text = f"NCTCRC:split={split}:root={nct_tree}"
    name = {"TRAIN": "COUNTS_100K", "VAL": "COUNTS_7K"}[split]
    with caplog.at_level(logging.WARNING, logger="dinov2"):
        make_dataset(dataset_str=text)
        assert f"ADI 1 (not {counts[0]})" in caplog.text and f"TUM 1 (not {counts[-1]})" in caplog.text
        caplog.clear()
        monkeypatch.setattr(NCTCRC, name, (1,) * 9 if split == "TRAIN" else (1, *[0] * 7, 1))
        make_dataset(dataset_str=text)
        assert "published" not in caplog.text


def test_nct_crc_wrong_split(nct_tree):
    with pytest.raises(DatasetError, match=r'no split "TEST".*TRAIN, VAL, TRAIN_NONORM'):
        make_dataset(dataset_str=f"NCTCRC:split=TEST:root={nct_tree}")


def relative(dataset):
    return [dataset.get_image_path(i).removeprefix(f"{dataset.root}/") for i in range(len(dataset))]


def test_any_tree_without_labels(class_tree, encoded):
    (class_tree / "z.jpg").write_bytes(encoded[6])
    dataset = make_dataset(dataset_str=f"ImageFolder:root={class_tree}:labels=none")
    assert relative(dataset) == [
        *("stroma/d.jpeg", "stroma/e.jpg", "tumour/a.jpg", "tumour/c.png", "tumour/x/b.JPG"),
        "z.jpg",
    ]
    assert dataset[5][1] is dataset.get_target(0) is dataset.classes is None
    with pytest.raises(DatasetError, match="labels=none"):
        dataset.get_targets()


def test_images_without_a_class_are_told(class_tree, encoded, caplog):
    (class_tree / "z.jpg").write_bytes(encoded[6])
    assert len(ImageFolder(root=str(class_tree))) == 5
    assert "1 images lie in" in caplog.text


def test_links_are_followed_once_and_hidden_folders_are_not(class_tree, encoded, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "l.jpg").write_bytes(encoded[5])
    (class_tree / "stroma" / "link").symlink_to(elsewhere)
    (class_tree / "stroma" / "up").symlink_to(class_tree)
    (class_tree / "stroma" / "self").symlink_to(class_tree / "stroma" / "self")
    (class_tree / "stroma" / "gone.jpg").symlink_to(tmp_path / "gone.jpg")
    for hidden in (".cache", "stroma/.ipynb_checkpoints"):
        (class_tree / hidden).mkdir()
        (class_tree / hidden / "h.jpg").write_bytes(encoded[5])
    dataset = ImageFolder(root=str(class_tree))
    assert dataset.classes == ["stroma", "tumour"]
    assert relative(dataset)[:4] == ["stroma/d.jpeg", "stroma/e.jpg", "stroma/gone.jpg", "stroma/link/l.jpg"]
    assert dataset.get_targets().tolist() == [0] * 4 + [1] * 3, "the way up does not lead to the other class"
    assert len(ImageFolder(root=str(class_tree), labels="none")) == 7


def test_wrong_labels(class_tree):
    with pytest.raises(DatasetError, match='"no"; it takes folders or none'):
        make_dataset(dataset_str=f"ImageFolder:root={class_tree}:labels=no")


def test_a_copy_for_a_worker_holds_no_object_per_image_and_lists_nothing(class_tree, monkeypatch):
    dataset = ImageFolder(root=str(class_tree))
    before = pickle.dumps(dataset)
    for number in range(300):
        (class_tree / "tumour" / f"more_{number}.jpg").touch()
    larger = ImageFolder(root=str(class_tree))
    operations = [sum(1 for _ in pickletools.genops(text)) for text in (before, pickle.dumps(larger))]
    assert len(larger) == len(dataset) + 300
    assert abs(operations[0] - operations[1]) < 10
    monkeypatch.setattr(os, "scandir", None)
    copy = pickle.loads(pickle.dumps(larger))
    assert copy.get_image_path(304) == larger.get_image_path(304)


def test_nct_crc_without_normalisation(tmp_path, encoded):
    for name in NCTCRC.CLASSES:
        (tmp_path / "NCT-CRC-HE-100K-NONORM" / name).mkdir(parents=True)
        (tmp_path / "NCT-CRC-HE-100K-NONORM" / name / "1.tif").write_bytes(encoded[0])
    dataset = make_dataset(dataset_str=f"NCTCRC:split=TRAIN_NONORM:root={tmp_path}")
    assert dataset.get_targets().tolist() == list(range(9))
    assert dataset.classes == ["ADI", "BACK", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM"]


def test_nct_crc_with_the_folder_of_a_split_as_root(nct_tree):
    with pytest.raises(DatasetError, match=f"missing: give root={nct_tree}$"):
        make_dataset(dataset_str=f"NCTCRC:split=TRAIN:root={nct_tree}/NCT-CRC-HE-100K")
