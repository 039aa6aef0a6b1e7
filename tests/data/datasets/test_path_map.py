"""Rewriting of recorded paths."""

import pytest

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


@pytest.mark.parametrize("text", ["/a", "=/b", "/a="])
def test_refused(text):
    with pytest.raises(DatasetError, match="path_map"):
        PathMap.parse(text)
