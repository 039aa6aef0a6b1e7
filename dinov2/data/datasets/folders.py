"""Files below a folder that fit a pattern."""

from pathlib import Path, PurePath

from dinov2.errors import DatasetError


def files_matching(root: str, pattern: str, *, example: str = "*.tar") -> set[Path]:
    """Return the files below a folder whose paths fit a pattern; none when nothing fits.

    Args:
        root: the folder.
        pattern: a path below it, in which ``*`` and ``?`` stand for parts of names and ``**`` for folders.
        example: a pattern for the error.

    Raises:
        DatasetError: it is no pattern: empty, from ``/`` on, or with ``**`` in a name.
    """
    parts = PurePath(pattern).parts
    # What Path.glob refuses, and with which error, depends on the version of Python.
    if not parts or PurePath(pattern).is_absolute() or any("**" in part and part != "**" for part in parts):
        raise DatasetError(
            f'the pattern "{pattern}" is no pattern below root: write {example} or **/{example}'
        )
    return {path for path in Path(root).glob(pattern) if path.is_file()}
