"""How the files that a training exports, and the entries inside them, are called."""

import re

NETWORKS = ("teacher", "student")  # in order of preference
HEADS = ("dino_head", "ibot_head")
HEAD_KEYS = tuple(f"{network}_{head}" for head in HEADS for network in NETWORKS)
CENTERS = "centers"
PARTS = (*HEAD_KEYS, *NETWORKS, CENTERS)
SUFFIX = "_checkpoint.pth"
EXPORT_FOLDER = re.compile(r"training_(\d+)")  # and the iteration after which it was written

# The model farm's: <architecture>_<data>_<how it was trained>_<iteration>_<which network>_checkpoint.pth
FARM_NAME = re.compile(r"dinov2_[\w.-]+_(teacher|student)(_(dino|ibot)_head)?_checkpoint\.pth")


def checkpoint_name(part: str) -> str:
    """Return the file name of an exported part, e.g. ``teacher`` or ``student_dino_head``."""
    return f"{part}{SUFFIX}"


def split_name(file_name: str) -> tuple[str, str] | None:
    """Return the prefix, which may be empty, and the part of an exported file's name; None for another name.

    A prefix ends in no letter or digit: ``mystudent_checkpoint.pth`` is no student's.
    """
    for part in PARTS:
        prefix = file_name.removesuffix(checkpoint_name(part))
        if prefix != file_name and not prefix[-1:].isalnum():
            return prefix, part
    return None
