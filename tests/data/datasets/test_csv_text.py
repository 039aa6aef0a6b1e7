"""CSV files of paths that are none, through every reader that has them."""

import pytest

from dinov2.data.datasets import ImageNet, Pathology
from dinov2.data.datasets.CustomImageDataset import CustomImageDataset
from dinov2.data.slides.slide_csv import read_slide_csv
from dinov2.errors import DatasetError


def pathology(folder):
    Pathology(split="TRAIN", root=str(folder), extra=str(folder))


def custom_images(folder):
    CustomImageDataset(extra=str(folder / "entry.csv"))


def slides(folder):
    read_slide_csv(folder / "entry.csv")


def image_net(folder):
    (folder / "train").mkdir()
    (folder / "entry.csv").rename(folder / "labels.txt")
    ImageNet(split="TRAIN", root=str(folder), extra=str(folder)).dump_extra()


@pytest.fixture(params=[pathology, custom_images, slides, image_net])
def read(request, tmp_path):
    """Write a file that each of the readers looks for a path in, and have it read."""
    (tmp_path / "here.png").touch()

    def write_and_read(content: bytes):
        (tmp_path / "entry.csv").write_bytes(content)
        with pytest.raises(DatasetError) as caught:
            request.param(tmp_path)
        assert type(caught.value) is DatasetError
        assert "\n" not in str(caught.value)
        assert "\0" not in str(caught.value)
        return str(caught.value)

    return write_and_read


def test_a_quotation_mark_that_is_not_closed(read):
    """The rest of the file is one field, longer than the module csv takes."""
    text = read(b'path,patches_path\nhere.png,"/a\n' + b"here.png,/path/of/a/folder\n" * 5000)
    assert "is no CSV file (field larger than field limit (131072)): close the quotation marks in it" in text


def test_a_header_without_end(read):
    assert "is no CSV file (field larger" in read(b"path,patches_path," + b"x" * 131_073)


def test_a_nul_byte_in_a_path(read):
    text = read(b"path,patches_path\nhere.png,/tmp\nb\0.png,/b\0\n")
    assert "line 3 of " in text
    assert "holds a NUL byte, which no path can: save the file as CSV in UTF-8" in text


def test_a_file_in_utf_16(read):
    assert "line 1 of " in read("path,patches_path\nhere.png,/tmp\n".encode("utf-16-le"))
