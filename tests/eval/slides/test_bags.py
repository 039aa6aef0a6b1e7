"""Bags of this project, of CLAM and of TRIDENT; and files that are none."""

import h5py
import numpy as np
import pytest
import torch

from dinov2.errors import DatasetError
from dinov2.eval.slides.bags import find_bags, read_bag

FEATURES = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
COORDS = np.arange(10).reshape(5, 2) * 512
COORDS_INT32 = COORDS.astype(np.int32)


def write_clam(path, features=FEATURES, coords=COORDS_INT32, name="features"):
    """CLAM's feature files: two datasets, no attributes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file[name] = features
        if coords is not None:
            file["coords"] = coords
    return path


def write_trident(path):
    """TRIDENT's: the encoder at the features, the geometry at the coordinates."""
    with h5py.File(path, "w") as file:
        file["features"] = FEATURES
        file["features"].attrs["encoder"] = "uni_v1"
        file["coords"] = COORDS
        for key, value in {
            "patch_size": 256,
            "patch_size_level0": 512,
            "level0_magnification": 40,
            "target_magnification": 20,
            "overlap": 0,
            "name": np.bytes_("a slide"),
            "level_dim": np.array([8, 9]),
        }.items():
            file["coords"].attrs[key] = value
    return path


def test_a_file_of_clam_is_read(tmp_path):
    bag = read_bag(write_clam(tmp_path / "TCGA-A1.b-c.h5"))
    assert (bag.name, bag.attributes, len(bag)) == ("TCGA-A1.b-c", {}, 5)
    assert bag.features.dtype == torch.float32 and np.array_equal(bag.features, FEATURES)
    assert bag.coords.dtype == torch.int64 and np.array_equal(bag.coords, COORDS)


def test_a_file_of_trident_is_read_with_its_attributes_as_plain_values(tmp_path):
    bag = read_bag(write_trident(tmp_path / "x.h5"))
    assert bag.attributes == {
        "encoder": "uni_v1",
        "patch_size": 256,
        "patch_size_level0": 512,
        "level0_magnification": 40,
        "target_magnification": 20,
        "overlap": 0,
        "name": "a slide",
        "level_dim": [8, 9],
    }
    assert type(bag.attributes["patch_size"]) is int


@pytest.mark.parametrize(
    ("features", "coords", "name"),
    [
        (FEATURES[None], COORDS[None], "features"),
        (FEATURES, None, "features"),
        (FEATURES, COORDS, "feats"),
        (FEATURES.astype(np.float16), COORDS, "features"),
    ],
    ids=["with a leading 1", "without coords", "HistoBistro's name", "half precision"],
)
def test_other_layouts_are_read(tmp_path, features, coords, name):
    bag = read_bag(write_clam(tmp_path / "a.h5", features, coords, name))
    assert np.array_equal(bag.features, features.reshape(5, 4))
    assert bag.features.numpy().dtype == features.dtype
    assert bag.coords is None if coords is None else np.array_equal(bag.coords, COORDS)


def test_bags_of_torch_are_read(tmp_path):
    torch.save(torch.from_numpy(FEATURES), tmp_path / "a.pt")
    assert read_bag(tmp_path / "a.pt").coords is None
    assert np.array_equal(read_bag(tmp_path / "a.pt").features, FEATURES)
    torch.save(
        {"features": torch.from_numpy(FEATURES), "coords": torch.from_numpy(COORDS)}, tmp_path / "b.pt"
    )
    assert np.array_equal(read_bag(tmp_path / "b.pt").coords, COORDS)


def test_the_number_format_can_be_chosen(tmp_path):
    path = write_clam(tmp_path / "a.h5")
    assert read_bag(path, dtype=torch.float16).features.dtype == torch.float16


NOT_FINITE = np.where(np.arange(5)[:, None] == 3, np.nan, FEATURES)


@pytest.mark.parametrize(
    ("features", "coords", "sentence"),
    [
        (FEATURES, COORDS[:4], "features of 5 tiles but coordinates of 4"),
        (FEATURES, COORDS.reshape(2, 5), r"coordinates .* shape \[2, 5\]"),
        (FEATURES[:0], COORDS[:0], r"holds no tile .*--min-tissue"),
        (NOT_FINITE, COORDS, "features of tile 3 .* not finite"),
        (FEATURES[0], COORDS, r"float32 of the shape \[4\]"),
        (np.stack([FEATURES, FEATURES]), COORDS, r"shape \[2, 5, 4\]"),
        (FEATURES.astype(np.int64), COORDS, "int64"),
    ],
)
def test_a_bag_that_cannot_be_used_is_refused_in_one_sentence(tmp_path, features, coords, sentence):
    path = write_clam(tmp_path / "odd.h5", features, coords)
    with pytest.raises(DatasetError, match=sentence) as caught:
        read_bag(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_no_bag_is_refused_in_one_sentence(tmp_path):
    whole = write_clam(tmp_path / "whole.h5").read_bytes()
    (tmp_path / "cut.h5").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.pt").write_text("no tensor")
    (tmp_path / "empty.pt").touch()
    torch.save({"other": torch.zeros(3)}, tmp_path / "dict.pt")
    write_clam(tmp_path / "coords.h5", COORDS, None, "coords")
    with h5py.File(tmp_path / "group.h5", "w") as file:
        file.create_group("features")
    (tmp_path / "a.npy").touch()
    names = ["cut.h5", "text.pt", "empty.pt", "dict.pt", "coords.h5", "group.h5", "a.npy", "missing.h5"]
    for name in names:
        with pytest.raises(DatasetError, match=name) as caught:
            read_bag(tmp_path / name)
        assert "\n" not in str(caught.value), name


def test_bags_are_found_at_any_depth_by_the_names_of_their_slides(tmp_path):
    for path in ("b/features_uni/two.h5", "one.h5", "c/three.hdf5"):
        write_clam(tmp_path / path)
    write_clam(tmp_path / "patches" / "one.h5", COORDS, None, "coords")
    write_clam(tmp_path / "c" / ".three.h5.0123.tmp")
    (tmp_path / "notes.txt").touch()
    assert find_bags(tmp_path) == {
        "one": tmp_path / "one.h5",
        "three": tmp_path / "c/three.hdf5",
        "two": tmp_path / "b/features_uni/two.h5",
    }


def test_of_both_formats_of_an_extraction_the_one_with_coordinates_is_taken(tmp_path):
    write_clam(tmp_path / "h5_files" / "one.h5")
    (tmp_path / "pt_files").mkdir()
    for name in ("one", "two"):
        torch.save(torch.from_numpy(FEATURES), tmp_path / "pt_files" / f"{name}.pt")
    found = find_bags(tmp_path)
    assert found == {"one": tmp_path / "h5_files/one.h5", "two": tmp_path / "pt_files/two.pt"}


def test_two_bags_of_one_slide_are_refused_naming_both(tmp_path):
    paths = [write_clam(tmp_path / folder / "one.h5") for folder in ("features_uni", "features_ours")]
    with pytest.raises(DatasetError, match="two bags") as caught:
        find_bags(tmp_path)
    assert all(str(path) in str(caught.value) for path in paths)


def test_a_folder_without_bags_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(DatasetError, match="there is no bag in"):
            find_bags(folder)
