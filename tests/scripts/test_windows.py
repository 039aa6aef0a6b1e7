"""The labelled windows: how many, how split, what they show."""

from collections import Counter

import numpy as np
import pytest

from scripts.quickstart.windows import (
    GREY_MEAN,
    GREY_STD,
    WINDOW_PIXELS,
    equal_grey,
    nucleus_task,
    nucleus_windows,
    tissue_task,
    tissue_windows,
)


def covered(windows, size):
    """Pixels that the windows cover, as a mask."""
    mask = np.zeros(size[::-1], bool)
    for window in windows:
        mask[window.y : window.y + WINDOW_PIXELS, window.x : window.x + WINDOW_PIXELS] = True
    return mask


@pytest.mark.parametrize(
    ("windows", "size", "counts"),
    [
        (
            tissue_windows(),
            (2220, 2967),
            {
                ("train", "background"): 40,
                ("train", "epithelium"): 17,
                ("train", "stroma"): 48,
                ("test", "background"): 20,
                ("test", "epithelium"): 12,
                ("test", "stroma"): 10,
            },
        ),
        (
            nucleus_windows((1500, 1500)),
            (1500, 1500),
            {
                ("train", "connective"): 51,
                ("train", "inflammatory"): 60,
                ("train", "neoplastic"): 60,
                ("test", "connective"): 32,
                ("test", "inflammatory"): 53,
                ("test", "neoplastic"): 60,
            },
        ),
    ],
    ids=["tissue", "nuclei"],
)
def test_counts_and_disjoint_sides(windows, size, counts):
    assert Counter((window.split, window.label) for window in windows) == counts
    assert len({(window.x, window.y) for window in windows}) == len(windows)
    train, test = (covered([w for w in windows if w.split == split], size) for split in ("train", "test"))
    assert not (train & test).any()


def test_windows_follow_the_nuclei(tmp_path):
    """Three nuclei of one type label a window; two, or a mixture, do not."""
    table = tmp_path / "nuclei.csv"
    rows = ["image,x,y,label,split"]
    rows += [f"hgsc_nest.jpg,{x},20,connective,train" for x in (10, 20, 30)]
    rows += [f"hgsc_nest.jpg,{x},20,inflammatory,train" for x in (240, 250)]
    rows += [
        f"hgsc_nest.jpg,{x},160,{label},test" for x, label in ((10, "a"), (20, "a"), (30, "b"), (40, "b"))
    ]
    rows += [f"another.jpg,{x},160,neoplastic,test" for x in (240, 250, 260)]
    table.write_text("\n".join(rows))
    found = nucleus_windows((336, 280), table)
    assert [(w.x, w.y, w.label, w.split) for w in found] == [(0, 0, "connective", "train")]


def test_grey_windows_have_no_colour_and_equal_contrast():
    task = nucleus_task()
    pixels = np.concatenate([task.pixels["train"], task.pixels["test"]])
    assert pixels.shape == (316, WINDOW_PIXELS, WINDOW_PIXELS, 3)
    assert (pixels == pixels[..., :1]).all()
    # Clipping at black and white moves the moments a little.
    assert np.abs(pixels.mean(axis=(1, 2, 3)) - GREY_MEAN).max() < 6
    assert np.abs(pixels[..., 0].std(axis=(1, 2)) - GREY_STD).max() < 8


def test_an_even_window_stays_finite():
    assert (equal_grey(np.full((4, 4, 3), 200, np.uint8)) == GREY_MEAN).all()


def test_tissue_windows_are_in_colour():
    task = tissue_task()
    assert task.classes == ["background", "epithelium", "stroma"]
    glass = task.pixels["test"][task.labels["test"] == 0]
    stroma = task.pixels["test"][task.labels["test"] == 2]
    assert glass.mean() > 230
    assert stroma[..., 0].mean() > stroma[..., 1].mean() + 30  # eosin: red over green
