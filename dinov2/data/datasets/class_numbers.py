"""Labels as they are written, turned into class numbers: one rule for all datasets."""

from collections.abc import Iterable


def class_numbers(labels: Iterable[str]) -> tuple[dict[str, int], list[str] | None]:
    """Return the number of every label, and the names of the classes.

    If all labels are whole numbers they stay as they are, and there are no names (None). Otherwise the labels
    are the names, numbered in the order of the alphabet.
    """
    different = sorted(set(labels))
    if all(_is_whole_number(label) for label in different):
        return {label: int(label) for label in different}, None
    return {label: number for number, label in enumerate(different)}, different


def _is_whole_number(text: str) -> bool:
    return text.removeprefix("-").isdecimal() and text.isascii()
