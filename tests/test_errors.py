"""Parts of sentences that many errors share."""

import pytest

from dinov2.errors import nearest, some_of


@pytest.mark.parametrize(
    ("items", "text"),
    [
        ([], ""),
        (["a"], "a"),
        (["a", "b", "c"], "a, b, c"),
        (iter("abcd"), "a, b, c and 1 more"),
        (range(100), "0, 1, 2 and 97 more"),
    ],
)
def test_some_of_many(items, text):
    assert some_of(items, 3) == text


def test_another_separator():
    assert some_of(["a, b", "c", "d"], 2, separator="; ") == "a, b; c and 1 more"


def test_how_alike_names_must_be():
    assert nearest("site", ["slide"]) == ' (did you mean "slide"?)'
    assert nearest("site", ["slide"], cutoff=0.8) == ""
    assert nearest("slides", ["slide"], cutoff=0.8) == ' (did you mean "slide"?)'
