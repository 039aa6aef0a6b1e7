"""ImageNet-22k: images inside tar archives."""

import gzip
import io
import pickle
import tarfile

import numpy as np
import pytest

from dinov2.data import make_dataset
from dinov2.data.datasets import ImageNet22k
from dinov2.errors import DatasetError


@pytest.fixture
def archives(tmp_path, encoded):
    """Three classes; one image is stored compressed and one is the known broken one."""
    content = {
        "n01": {"n01_1.JPEG": encoded[0], "n01_2.JPEG": gzip.compress(encoded[1])},
        "n02": {"n02_5.JPEG": encoded[2]},
        "n06470073": {"n06470073_47249.JPEG": b"broken", "n06470073_1.JPEG": encoded[3]},
    }
    for class_id, images in content.items():
        with tarfile.open(tmp_path / f"{class_id}.tar", "w") as archive:
            for name, data in images.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return tmp_path


@pytest.fixture
def dataset(archives):
    dataset = ImageNet22k(root=str(archives), extra=str(archives / "extra"), mmap_cache_size=2)
    dataset.dump_extra()
    return dataset


def test_images(dataset, encoded):
    assert [dataset.get_image_data(i) for i in range(4)] == encoded[:4]
    assert [dataset[i][1] for i in range(4)] == [0, 0, 1, 2]
    assert dataset[1][0].size == (96, 96)
    assert len(dataset._archives) == 2


def test_labels(dataset):
    assert dataset.get_targets().tolist() == [0, 0, 1, 2]
    assert dataset.get_class_ids().tolist() == ["n01", "n01", "n02", "n06470073"]
    assert dataset.get_class_id(2) == dataset.find_class_id(1) == "n02"


def test_an_index_that_ends_at_the_next_header(dataset, archives, encoded):
    """Upstream's index counts in blocks, so a slice ends in padding."""
    entries = np.load(archives / "extra" / "entries.npy")
    entries["end_offset"] += -entries["end_offset"] % 512
    np.save(archives / "extra" / "entries.npy", entries)
    text = f"ImageNet22k:root={archives}:extra={archives}/extra:mmap_cache_size=1"
    padded = make_dataset(dataset_str=text)
    assert [padded.get_image_data(i).rstrip(b"\0") for i in range(4)] == encoded[:4]
    assert np.array_equal(np.asarray(padded[1][0]), np.asarray(dataset[1][0]))


def test_pickles_without_its_archives(dataset, encoded):
    assert dataset[0]
    assert pickle.loads(pickle.dumps(dataset)).get_image_data(3) == encoded[3]


def test_path_names_archive_and_member(dataset):
    assert dataset.get_image_path(2).endswith("n02.tar:n02_5.JPEG")


def test_no_archives(tmp_path):
    with pytest.raises(DatasetError, match="finds no archive"):
        ImageNet22k(root=str(tmp_path), extra=str(tmp_path)).dump_extra()
