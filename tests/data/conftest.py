"""Real tiles, cut from the carcinoma picture, and trees made of them."""

import io

import pytest
from PIL import Image

from dinov2.utils.log_once import log_once
from tests.conftest import REAL_DATA

TILE = 96  # pixels


@pytest.fixture(autouse=True)
def _nothing_logged_yet():
    log_once.cache_clear()


@pytest.fixture(scope="session")
def tiles():
    """Twelve H&E tiles, PIL RGB."""
    with Image.open(REAL_DATA / "hgsc_nest.jpg") as picture:
        corners = [(x, y) for y in range(0, 3 * 300, 300) for x in range(0, 4 * 300, 300)]
        return [picture.crop((x, y, x + TILE, y + TILE)).convert("RGB") for x, y in corners]


@pytest.fixture(scope="session")
def encoded(tiles):
    """The same tiles as JPEG files."""
    files = []
    for tile in tiles:
        buffer = io.BytesIO()
        tile.save(buffer, "JPEG", quality=95)
        files.append(buffer.getvalue())
    return files


@pytest.fixture
def tile_tree(tmp_path, encoded):
    """Three slides in the layout of the forks; their tile numbers are neither contiguous nor in order."""
    numbers = {"slide_b": [10, 2, 7], "slide_a": [0, 100, 99, 3], "TCGA_patch_x": [5]}
    files = iter(encoded)
    for slide, of_slide in numbers.items():
        (tmp_path / "patches" / slide).mkdir(parents=True)
        for number in of_slide:
            tmp_path.joinpath("patches", slide, f"{slide}_patch_{number}.jpeg").write_bytes(next(files))
    (tmp_path / "entry.csv").write_text(f"name,patches_path\ncarcinoma,{tmp_path / 'patches'}\n")
    return tmp_path


@pytest.fixture
def class_tree(tmp_path, encoded):
    """Two classes with three and two images, one of them a level deeper."""
    for number, place in enumerate(
        ["tumour/a.jpg", "tumour/x/b.JPG", "tumour/c.png", "stroma/d.jpeg", "stroma/e.jpg"]
    ):
        path = tmp_path / "classes" / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded[number])
    (tmp_path / "classes" / "tumour" / "notes.txt").write_text("no image")
    return tmp_path / "classes"
