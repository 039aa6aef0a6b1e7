"""The grammar of mixtures: where a plus separates, and where it belongs to a value."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinov2.data.dataset_string import format_dataset_string, parse_dataset_string, split_mixture
from dinov2.data.loaders import DATASETS, make_dataset
from dinov2.errors import DatasetError

NAMES = st.sampled_from(sorted(DATASETS))
KEYS = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]*", fullmatch=True)
# Pieces that look like separators, weights and names, so that values try hard to be misread.
PIECES = st.sampled_from(["+", "NCTCRC", "ImageNet", "2*", ":", "=", '"', "'", "%", " ", "a", "/", "*", "\n"])
VALUES = st.one_of(st.lists(PIECES, max_size=8).map("".join), st.text(max_size=6).filter(str.isprintable))
WEIGHTS = st.sampled_from([None, "2", "0.5", ".25", "3.", "1e-3", "10E2"])
PARTS = st.tuples(WEIGHTS, NAMES, st.dictionaries(KEYS, VALUES, max_size=3))


def part_text(weight, name, options):
    return (f"{weight}*" if weight else "") + format_dataset_string(name, **options)


@settings(max_examples=200, deadline=None)
@given(st.lists(PARTS, min_size=1, max_size=4), st.sampled_from(["+", " + ", "\n+ "]))
def test_what_is_written_is_read_back(parts, plus):
    found = split_mixture(plus.join(part_text(*part) for part in parts), DATASETS)
    assert [parse_dataset_string(part.dataset_str) for part in found] == [
        (name, options) for _, name, options in parts
    ]
    assert [part.weight for part in found] == [None if w is None else Fraction(w) for w, _, _ in parts]


def quoted(value):
    return f'"{value}"' if '"' not in value else f"'{value}'"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(NAMES, st.dictionaries(KEYS, VALUES, max_size=3)), min_size=1, max_size=4))
def test_quoted_values_never_split(parts):
    parts = [
        (name, {key: value for key, value in options.items() if not {'"', "'"} <= set(value)})
        for name, options in parts
    ]
    texts = [":".join([name, *(f"{k}={quoted(v)}" for k, v in options.items())]) for name, options in parts]
    found = split_mixture("+".join(texts), DATASETS)
    assert [parse_dataset_string(part.dataset_str) for part in found] == parts


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=40))
def test_text_without_a_name_behind_a_plus_is_one_part(text):
    text = "+".join(piece for piece in text.split("+") if not any(name in piece for name in DATASETS))
    if "*" in text.partition(":")[0]:
        return  # a weight, or a wrong one
    assert [part.dataset_str for part in split_mixture(text, DATASETS)] == [text]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ImageFolder:root=/h+e", ["ImageFolder:root=/h+e"]),
        ("ImageFolder:root=/h+e:x=1", ["ImageFolder:root=/h+e:x=1"]),
        ("ImageFolder:root=/a+NCTCRCs:x=1", ["ImageFolder:root=/a+NCTCRCs:x=1"]),
        ("ImageFolder:root=/a+NCTCRC/b", ["ImageFolder:root=/a+NCTCRC/b"]),
        ("ImageFolder:root=/a+2*b", ["ImageFolder:root=/a+2*b"]),
        ("ImageFolder:root=/a+NCTCRC:split=VAL", ["ImageFolder:root=/a", "NCTCRC:split=VAL"]),
        ("ImageNet+ImageNet22k+NCTCRC", ["ImageNet", "ImageNet22k", "NCTCRC"]),
        ("ImageFolder:root=/a+e+0.5*NCTCRC:root=/+", ["ImageFolder:root=/a+e", "NCTCRC:root=/+"]),
        ("ImageFolder:root='/a+NCTCRC:x'+NCTCRC", ["ImageFolder:root='/a+NCTCRC:x'", "NCTCRC"]),
        ("ImageFolder:root=it's+NCTCRC:root=it's", ["ImageFolder:root=it's", "NCTCRC:root=it's"]),
        ("ImageFolder:root=/a%2BNCTCRC", ["ImageFolder:root=/a%2BNCTCRC"]),
    ],
)
def test_where_a_plus_separates(text, expected):
    assert [part.dataset_str for part in split_mixture(text, DATASETS)] == expected


@pytest.mark.parametrize(
    "weight", ["0", "0.0", "-1", "nan", "inf", "1e400", "", "two", "1/2", "0e5", "1_0", "\u0662"]
)
@pytest.mark.parametrize("text", ["{}*NCTCRC:root=/x", "ImageNet:root=/y+{}*NCTCRC:root=/x"])
def test_wrong_weights(weight, text):
    with pytest.raises(DatasetError, match=r'the weight ".*" of ".*NCTCRC:root=/x" is no positive number'):
        split_mixture(text.format(weight), DATASETS)


def test_a_weight_without_its_star_is_understood():
    with pytest.raises(DatasetError, match=r"did you mean \"2\*ImageFolder\""):
        make_dataset(dataset_str="2ImageFolder:root=/x")
