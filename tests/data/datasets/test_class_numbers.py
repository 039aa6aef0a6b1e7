"""Labels as class numbers."""

import pytest

from dinov2.data.datasets.class_numbers import class_numbers


@pytest.mark.parametrize(
    ("labels", "numbers", "classes"),
    [
        (["7", "-1", "7"], {"7": 7, "-1": -1}, None),
        (["b", "a", "b"], {"a": 0, "b": 1}, ["a", "b"]),
        (["2", "3+"], {"2": 0, "3+": 1}, ["2", "3+"]),
        (["10", "9", "x"], {"10": 0, "9": 1, "x": 2}, ["10", "9", "x"]),
        ([], {}, None),
    ],
)
def test_numbers_stay_and_names_are_numbered(labels, numbers, classes):
    assert class_numbers(iter(labels)) == (numbers, classes)
