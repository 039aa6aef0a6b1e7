"""Which file names are tiles: the fast way, the general way, and names of any kind on a real file system."""

import os
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinov2.data.indexing import dirents
from dinov2.data.indexing.listing import list_slide
from dinov2.data.indexing.names import SUFFIXES, parse_names, tile_name

# What a file may be called: any bytes but "/" and zero, with "." and ".." reserved.
FILE_NAMES = (
    st.binary(min_size=1, max_size=40)
    .map(lambda name: name.replace(b"/", b"_").replace(b"\0", b"0"))
    .filter(lambda name: name not in (b".", b".."))
    .map(os.fsdecode)
)
SLIDES = st.one_of(FILE_NAMES, st.sampled_from(["s", "TCGA-AB-1234-01Z-00-DX1", "eight_by", "a" * 21]))
NUMBERS = st.one_of(st.integers(0, 2**32 - 1), st.integers(0, 300))
NEAR_MISSES = st.sampled_from(
    [
        "{s}_patch_.jpeg",
        "{s}_patch_01.jpeg",
        "{s}_patch_4294967296.jpeg",
        "{s}_patch_1.JPEG",
        "{s}_patch_1.jpeg.",
        "x{s}_patch_1.jpeg",
    ]
    + [
        "{s}_patch_1_patch_2.jpeg",
        "{s}_patch_-1.jpeg",
        "{s}_patch_1.jpeg.jpeg",
        "{s}_patch_\u0661.jpeg",
        "\x08{s}_patch_5.jpeg",
    ]
    + [
        "aaaaaaa\x08{s}_patch_5.jpeg",
        "{s}_patch_99999999999.jpeg",
        "{s}_patch_7.tif",
        "{s}_patch_12345678901234567890.png",
    ]
)


def by_hand(slide, names):
    """An independent reading: a name is a tile's if writing the number again gives the name."""
    found = {}
    for name in names:
        for suffix in SUFFIXES:
            digits = name[len(slide) + len("_patch_") : -len(suffix)]
            number = int(digits) if digits.isascii() and digits.isdigit() else 2**32
            if number < 2**32 and name == f"{slide}_patch_{number}{suffix}":
                found[name] = (suffix, number)
    count = Counter(suffix for suffix, _ in found.values())
    common = max(SUFFIXES, key=lambda suffix: (count[suffix], -SUFFIXES.index(suffix)))
    return common, sorted(number for suffix, number in found.values() if suffix == common)


@settings(max_examples=80, deadline=None)
@given(
    SLIDES,
    st.sets(st.tuples(NUMBERS, st.sampled_from(SUFFIXES)), max_size=60),
    st.sets(FILE_NAMES, max_size=6),
    st.sets(NEAR_MISSES, max_size=4),
)
def test_names_of_any_kind(slide, tiles, others, misses):
    slide = os.fsdecode(os.fsencode(slide)[:150])
    names = {tile_name(slide, number, suffix) for number, suffix in tiles} | others
    names |= {miss.format(s=slide) for miss in misses}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, slide).mkdir()
        for name in names:
            Path(folder, slide, name).touch()
        record = list_slide(folder, slide, "none", None)
        assert (record.suffix, record.numbers.tolist()) == by_hand(slide, names)
        assert {name for name, _ in record.skipped} | {
            tile_name(slide, number, record.suffix) for number in record.numbers.tolist()
        } == names


def folder_with(tmp_path, slide, names):
    folder = tmp_path / slide
    folder.mkdir()
    for name in names:
        (folder / name).touch()
    return str(folder)


@pytest.mark.skipif(dirents._getdents64 is None, reason="the fast way needs Linux and its C library")
@settings(max_examples=12, deadline=None)
@given(
    st.one_of(st.text("abcXYZ-_0", min_size=1, max_size=70), st.just("sl\u00fcde \udcff\udcfe")),
    st.one_of(st.sets(NUMBERS, min_size=1, max_size=60), st.sets(NUMBERS, min_size=300, max_size=330)),
    st.sampled_from(SUFFIXES),
)
def test_the_fast_way_is_taken_and_agrees(slide, numbers, suffix):
    names = [tile_name(slide, number, suffix) for number in numbers]
    with tempfile.TemporaryDirectory() as folder:
        path = folder_with(Path(folder), slide, names)
        fast = dirents.regular_tiles(path, slide)
    assert fast is not None
    assert not fast.skipped
    general = parse_names(slide, names)
    assert fast.suffix == general.suffix == suffix
    assert np.array_equal(fast.numbers, general.numbers)
    assert fast.numbers.dtype == np.uint32


SLIDE = "TCGA-AB-1234-01Z-00-DX1"


@pytest.mark.skipif(dirents._getdents64 is None, reason="the fast way needs Linux and its C library")
@pytest.mark.parametrize(
    "odd",
    [
        f"{SLIDE}_patch_7.png",
        f"{SLIDE}_patch_007.jpeg",
        f"{SLIDE}_patch_4294967296.jpeg",
        f"{SLIDE}_patch_.jpeg",
        f"{SLIDE}_patch_7",
        f"{SLIDE}_patch_7.jpegs",
        f"{SLIDE}_patch_7.jpeg.jpeg",
        f"{SLIDE}_patch_7a.jpeg",
        f"{SLIDE}_patch_700000000000000.jpeg",
        "a folder",
        "a link to nothing",
    ],
)
@pytest.mark.parametrize("tiles", [3, 400])
def test_the_fast_way_declines_what_is_not_regular(tmp_path, odd, tiles):
    path = folder_with(tmp_path, SLIDE, [tile_name(SLIDE, 10 * number) for number in range(tiles)])
    assert dirents.regular_tiles(path, SLIDE) is not None
    place = Path(path, f"{SLIDE}_patch_7.jpeg" if odd.startswith("a ") else odd)
    if odd == "a folder":
        place.mkdir()
    elif odd == "a link to nothing":
        place.symlink_to(tmp_path / "none")
    else:
        place.touch()
    assert dirents.regular_tiles(path, SLIDE) is None
    record = list_slide(str(tmp_path), SLIDE, "none", None)
    assert record.numbers.tolist() == [10 * number for number in range(tiles)]
    assert [name for name, _ in record.skipped] == [place.name]


@pytest.mark.skipif(dirents._getdents64 is None, reason="the fast way needs Linux and its C library")
@pytest.mark.parametrize("slide", [SLIDE, "s"])
@pytest.mark.parametrize("tiles", [3, 400])
@pytest.mark.parametrize(
    "others",
    [
        ["notes.txt"],
        ["b", "a", ".hidden", "other_patch_7.jpeg"],
        ["aaaaaaa\x08{slide}_patch_5.jpeg"],
        ["{slide}_patch", "{slide}", "a{slide}_patch_1.jpeg"],
        ["\udcff.jpeg"],
    ],
)
def test_the_fast_way_leaves_other_files_out(tmp_path, slide, tiles, others):
    names = [tile_name(slide, 10 * number) for number in range(tiles)]
    names += [name.format(slide=slide) for name in others]
    fast = dirents.regular_tiles(folder_with(tmp_path, slide, names), slide)
    general = parse_names(slide, names)
    assert fast is not None
    assert fast.numbers.tolist() == general.numbers.tolist() == [10 * number for number in range(tiles)]
    assert fast.suffix == general.suffix
    assert fast.skipped == general.skipped
    assert len(fast.skipped) == len(others)
    assert parse_names("s", []).numbers.tolist() == []
