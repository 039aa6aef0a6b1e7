"""The quickstart's tiles, cut once from the shipped slide."""

import pytest

from scripts.quickstart.tiles import TileSet, make_tiles


@pytest.fixture(scope="session")
def tiles(tmp_path_factory) -> TileSet:
    return make_tiles(tmp_path_factory.mktemp("quickstart") / "tiles")
