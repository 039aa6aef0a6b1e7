"""The page of corrected defects: every item once, and every test it refers to exists."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]

PAGE = (REPO / "docs" / "defects.md").read_text()
ITEMS = range(1, 97)
ROWS = {
    int(number): references
    for number, references in re.findall(r"^\| (\d+) \|.*\| ([^|]+) \|$", PAGE, flags=re.MULTILINE)
}


@cache
def names_in(path):
    """The names of a file's tests, those of a class as Class::name."""
    tree = ast.parse((REPO / "tests" / path).read_text())
    classes = [(f"{node.name}::", node) for node in tree.body if isinstance(node, ast.ClassDef)]
    return {
        prefix + node.name
        for prefix, parent in [("", tree), *classes]
        for node in parent.body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_every_item_is_there_once():
    numbers = re.findall(r"^(?:\| (\d+) \||- (\d+):)", PAGE, flags=re.MULTILINE)
    assert sorted(int(row or later) for row, later in numbers) == list(ITEMS)


@pytest.mark.parametrize("number", ROWS)
def test_every_item_has_tests_that_exist(number):
    references = [word.strip().strip("`").partition("::") for word in ROWS[number].split(",")]
    missing = [f"{path}::{name}" for path, _, name in references if name not in names_in(path)]
    assert references and not missing
