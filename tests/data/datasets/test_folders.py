"""Files found by patterns, for shards and slides alike."""

from pathlib import Path

import pytest

from dinov2.data.datasets.shard_index import list_shards
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
