"""Labels as they are written, turned into class numbers: one rule for all datasets."""

from collections.abc import Iterable

from dinov2.errors import DatasetError

_MOST_DIGITS = 18  # any number of so many fits into 64 bits


def class_numbers(
    labels: Iterable[str], source: str = "the dataset"
) -> tuple[dict[str, int], list[str] | None]:
    """Return the number of every label, and the names of the classes.

    If all labels are whole numbers they stay as they are, and there are no names (None). Otherwise the labels
    are the names, numbered in the order of the alphabet.

    Args:
        labels: of the samples, in any order; may repeat.
        source: what has them, for a message.

    Raises:
        DatasetError: a whole number has too many digits for an array.
    """
    different = sorted(set(labels))
    if all(_is_whole_number(label) for label in different):
        longest = max(different, key=len, default="")
        if len(longest) > _MOST_DIGITS:
            raise DatasetError(f"{source} has the label {longest[:40]}: number classes from 0 on")
        return {label: int(label) for label in different}, None
    return {label: number for number, label in enumerate(different)}, different


def _is_whole_number(text: str) -> bool:
    return text.removeprefix("-").isdecimal() and text.isascii()
