"""The grammar of dataset strings."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinov2.data.dataset_string import format_dataset_string, parse_dataset_string
from dinov2.errors import DatasetError

NAMES = st.from_regex(r"[A-Za-z]\w*", fullmatch=True)
KEYS = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]*", fullmatch=True)
# File names may hold bytes that are no text; Python carries them as lone surrogates.
UNDECODABLE = st.characters(min_codepoint=0xDC80, max_codepoint=0xDCFF)
VALUES = st.text(
    st.one_of(st.characters(exclude_categories=("Cs",)), st.sampled_from(":=%\"'/ "), UNDECODABLE)
)


@settings(max_examples=60, deadline=None)
@given(NAMES, st.dictionaries(KEYS, VALUES, max_size=5))
def test_round_trip(name, options):
    text = format_dataset_string(name, **options)
    # Neighbouring lone surrogates may spell a character in UTF-8: the bytes are what must survive.
    parsed_name, parsed = parse_dataset_string(text)
    assert parsed_name == name
    assert {key: value.encode("utf-8", "surrogateescape") for key, value in parsed.items()} == {
        key: value.encode("utf-8", "surrogateescape") for key, value in options.items()
    }


@settings(max_examples=60, deadline=None)
@given(st.text())
def test_any_text_parses_or_is_refused_in_one_sentence(text):
    try:
        name, options = parse_dataset_string(text)
    except DatasetError as error:
        assert str(error)
    else:
        assert name
        assert all(isinstance(value, str) for value in options.values())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ImageNet", {}),
        ("A:root=/data:extra=/index", {"root": "/data", "extra": "/index"}),
        ("A:root=/data/a=b/c", {"root": "/data/a=b/c"}),
        ('A:root="/data:1/x=y":split=TRAIN', {"root": "/data:1/x=y", "split": "TRAIN"}),
        ("A:root='/it\"s:here'", {"root": '/it"s:here'}),
        ("A:root=/data%3A1%25:split=TRAIN", {"root": "/data:1%", "split": "TRAIN"}),
        ('A:root="/100%25"', {"root": "/100%25"}),
        ("A:root=/100%:split=TRAIN", {"root": "/100%", "split": "TRAIN"}),
        ("A:root=:split=TRAIN", {"root": "", "split": "TRAIN"}),
        ("A:root=/it's/here", {"root": "/it's/here"}),
    ],
)
def test_accepted(text, expected):
    assert parse_dataset_string(text)[1] == expected


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "names no dataset"),
        (":root=/x", "names no dataset"),
        ("A:root", '"root"'),
        ("A:root=C:\\data", r'"\\data"'),
        ("A:", '""'),
        ("A:root=/x:", '""'),
        ("A:root=/x:root=/y", '"root" occurs twice'),
        ('A:root="/x', "does not end in"),
        ('A:root="/x"y', "does not end in"),
        ("A:1root=/x", '"1root=/x"'),
    ],
)
def test_refused(text, word):
    with pytest.raises(DatasetError, match=word):
        parse_dataset_string(text)
