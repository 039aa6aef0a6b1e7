"""Labels as class numbers."""

import pytest

from dinov2.data.datasets.class_numbers import class_numbers
from dinov2.errors import DatasetError


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


def test_numbers_that_no_array_holds_are_refused():
    largest = "9" * 18
    assert class_numbers([largest])[0] == {largest: 10**18 - 1}
    with pytest.raises(DatasetError, match="the file has the label 99999999999999999999: number classes"):
        class_numbers(["1", "9" * 20], "the file")
    assert class_numbers(["a", "9" * 20])[1] == ["9" * 20, "a"]
