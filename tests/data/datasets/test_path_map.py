"""Rewriting of recorded paths."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinov2.data import make_dataset
from dinov2.data.datasets.path_map import SSHID_PATH_MAPS, PathMap
from dinov2.errors import DatasetError


@pytest.mark.parametrize(
    ("sshid", "path", "expected"),
    [
        ("11", "/data/tcga/x", "/nfs/data13/tcga/x"),
        ("11", "/nfs/data11/tcga/x", "/data/tcga/x"),
        ("11", "/database/x", "/database/x"),
        ("11", "/nfs/data13/x", "/nfs/data13/x"),
        ("11", "/data", "/nfs/data13"),
        ("448", "/d/20x_224px_0px_overlap/s", "/d/40x_448px_0px_overlap/s"),
        ("448", "/data/20x_224px/s", "/data/20x_224px/s"),
    ],
)
def test_historic_maps(sshid, path, expected):
    assert SSHID_PATH_MAPS[sshid](path) == expected


def test_parse():
    path_map = PathMap.parse("/a/=/b,/c=/d/e=f")
    assert path_map("/a/x") == "/b/x"
    assert path_map("/c/x") == "/d/e=f/x"
    assert path_map("/ab/x") == "/ab/x"


def test_the_longest_folder_wins_and_nothing_is_mapped_twice():
    path_map = PathMap.of({"/data": "/nfs", "/data/tcga": "/fast", "/nfs": "/data", "/": "/mnt"})
    assert path_map("/data/tcga/x") == "/fast/x"
    assert path_map("/data/other/x") == "/nfs/other/x"
    assert path_map("/nfs/x") == "/data/x"
    assert path_map("/tmp/x") == "/mnt/tmp/x"
    assert PathMap.of({"/mnt/": "/"})("/mnt/x") == "/x"
    assert path_map("relative/x") == "relative/x"


FOLDERS = st.lists(st.sampled_from(["a", "b", "ab"]), max_size=4).map(lambda parts: "/" + "/".join(parts))


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(FOLDERS, FOLDERS, max_size=5), FOLDERS, st.randoms())
def test_against_a_search_part_by_part(mapping, path, random):
    """An independent way: shorten the path a folder at a time until an old folder is found."""
    mapping = {old: new for old, new in mapping.items() if old != new}
    expected = path
    for head in [Path(path), *Path(path).parents]:
        if str(head) in mapping:
            expected = str(Path(mapping[str(head)], Path(path).relative_to(head)))
            break
    items = list(mapping.items())
    random.shuffle(items)
    assert str(Path(PathMap.of(dict(items))(path))) == expected


def test_the_first_map_that_knows_a_path_decides():
    general = PathMap.of({"/data/tcga": "/general", "/x": "/y"})
    combined = PathMap.parse("/data/tcga/a=/own").or_else(general).or_else(SSHID_PATH_MAPS["11"])
    assert combined("/data/tcga/a/1") == "/own/1"
    assert combined("/data/tcga/b/1") == "/general/b/1"
    assert combined("/data/z") == "/nfs/data13/z"
    assert combined("/x/20x_224px_0px_overlap/") == "/y/20x_224px_0px_overlap/"
    with_tile_size = general.or_else(SSHID_PATH_MAPS["448"])
    assert with_tile_size("/x/20x_224px_0px_overlap/s") == "/y/40x_448px_0px_overlap/s"
    assert not PathMap()
    assert combined


@pytest.mark.parametrize(
    ("mapping", "word"),
    [
        ({"": "/x"}, 'has "" -> "/x"; give the folder'),
        ({"data": "/x"}, 'has "data" -> "/x"; give the folder'),
        ({"/x": "nfs"}, 'has "/x" -> "nfs"; give the folder'),
        ({"/x": ""}, 'has "/x" -> ""; give the folder'),
        ({"/x/": "/x"}, "onto itself"),
        ({"/x": "/a", "/x/": "/b"}, 'two entries for "/x"'),
    ],
)
def test_refused_mappings(mapping, word):
    with pytest.raises(DatasetError, match=word):
        PathMap.of(mapping)


def test_general_map_reaches_strings_and_files(tmp_path, encoded):
    """One mapping for root, extra and the paths in the CSV file; the string's own map goes first."""
    here = tmp_path / "here"
    here.mkdir()
    (here / "1.jpg").write_bytes(encoded[0])
    (here / "list.csv").write_text("path\n/recorded/1.jpg\n/elsewhere/1.jpg\n1.jpg\n")
    string = f"CustomImageDataset:root=/recorded:extra=/recorded/list.csv:path_map=/elsewhere={here}"
    dataset = make_dataset(dataset_str=string, path_map={"/recorded": str(here), "/elsewhere": "/nowhere"})
    assert [dataset.get_image_path(index) for index in range(3)] == [str(here / "1.jpg")] * 3
    folder = make_dataset(dataset_str="ImageFolder:root=/recorded", path_map={"/recorded": str(tmp_path)})
    assert folder.get_image_path(0) == str(here / "1.jpg")


def test_messages_show_both_paths(tmp_path, tile_tree):
    (tmp_path / "list.csv").write_text("path\n/old/1.jpg\n")
    with pytest.raises(DatasetError, match=r'no "/new/1.jpg" \(recorded as "/old/1.jpg"'):
        make_dataset(dataset_str=f"CustomImageDataset:extra={tmp_path}/list.csv", path_map={"/old": "/new"})
    with pytest.raises(DatasetError, match=r'"/new/x", which is no folder.*root=/old/x -> "/new/x"'):
        make_dataset(dataset_str="ImageFolder:root=/old/x", path_map={"/old": "/new"})
    (tile_tree / "entry.csv").write_text("patches_path\n/old/tiles\n")
    string = f"Pathology:split=TRAIN:root={tile_tree}:extra={tile_tree}:sshid=13"
    with pytest.raises(DatasetError, match=r'"/new/tiles" \(recorded as "/old/tiles".*which is no folder'):
        make_dataset(dataset_str=string, path_map={"/old": "/new"})


@pytest.mark.parametrize("text", ["/a", "=/b", "/a="])
def test_refused(text):
    with pytest.raises(DatasetError, match="path_map"):
        PathMap.parse(text)
