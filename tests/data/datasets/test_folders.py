"""Files found by patterns, for shards and slides alike."""

from pathlib import Path

import pytest

from dinov2.data.datasets.shard_index import list_shards
from dinov2.data.slides.slide_list import list_slides
from dinov2.data.slides.sources import slides_of_folder
from dinov2.errors import DatasetError


@pytest.fixture
def folder(tmp_path):
    for name in ("a.svs", "b.tif", "sub/c.svs", "sub/deeper/d.svs"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def shards(folder, pattern):
    return [str(path.relative_to(folder)) for path in list_shards(str(folder), pattern, dataset="WebDataset")]


def slides(folder, pattern=""):
    return [str(Path(found.path).relative_to(folder)) for found in slides_of_folder(str(folder), pattern)]


@pytest.mark.parametrize("listed", [shards, slides])
@pytest.mark.parametrize("pattern", ["/data/*.svs", "**.svs", "sub/**.svs", ".", "./", "a**/b.svs"])
def test_what_is_no_pattern(folder, listed, pattern):
    with pytest.raises(
        DatasetError, match=r'the pattern "\S+" is no pattern below root: write \*\.(tar|svs) or'
    ):
        listed(folder, pattern)


def test_a_pattern_without_anything(folder):
    with pytest.raises(
        DatasetError, match=r'the pattern "" is no pattern below root: write \*\.tar or \*\*/'
    ):
        shards(folder, "")
    for nothing in (",", " , "):
        with pytest.raises(DatasetError, match=r"is no pattern below root: write \*\.svs or \*\*/\*\.svs"):
            slides(folder, nothing)


def test_empty_parts_of_a_list_are_passed_over(folder):
    assert slides(folder, "*.svs,") == ["a.svs"]
    assert slides(folder, "*.svs,, b.*, ") == ["a.svs", "b.tif"]


def test_patterns(folder):
    for listed in (shards, slides):
        assert listed(folder, "*.svs") == listed(folder, "./*.svs") == ["a.svs"]
        assert listed(folder, "**/*.svs") == ["a.svs", "sub/c.svs", "sub/deeper/d.svs"]
        assert listed(folder, "*/**/d.*") == listed(folder, "sub/**/**/d.svs") == ["sub/deeper/d.svs"]


@pytest.fixture
def linked(folder, tmp_path_factory):
    """Links to a folder elsewhere, to one beside it, back up, to themselves, and to nothing."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "e.svs").touch()
    (elsewhere / ".f.ndpi").touch()
    (elsewhere / "up").symlink_to(folder)
    (folder / "other").symlink_to(elsewhere)
    (folder / "all").symlink_to("sub")
    (folder / "sub" / "again").symlink_to(folder)
    (folder / "sub" / "itself").symlink_to("itself")
    (folder / "gone.svs").symlink_to(elsewhere / "gone.svs")
    (folder / "named.svs").symlink_to(folder / "a.svs")
    return folder


def to_tile(folder):
    return [str(Path(entry.path).relative_to(folder)) for entry in list_slides(str(folder))]


def test_links_to_folders_are_followed_and_no_file_is_found_twice(linked):
    found = ["a.svs", "named.svs", "other/e.svs", "sub/c.svs", "sub/deeper/d.svs"]
    assert slides(linked) == sorted([*found, "b.tif"])
    assert sorted(to_tile(linked)) == sorted([*found, "b.tif"])
    for listed in (shards, slides):
        assert listed(linked, "**/*.svs") == found
    assert shards(linked, "all/deeper/**/*.svs") == ["all/deeper/d.svs"]


def test_a_linked_root(linked, tmp_path_factory, monkeypatch):
    root = tmp_path_factory.mktemp("root") / "here"
    root.symlink_to(linked)
    assert slides(root) == slides(linked) and to_tile(root) == to_tile(linked)
    monkeypatch.chdir(root.parent)
    assert [found.path for found in slides_of_folder("here")] == [str(root / name) for name in slides(root)]
    monkeypatch.chdir(linked)
    assert [entry.path for entry in list_slides(".")] == to_tile(linked)
