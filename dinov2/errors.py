"""Errors a user can cause and mend.

Each message is one sentence (or one per problem): what was wrong, the value seen, what is accepted and
what to do. Command-line entry points print it and leave with exit status 1 (see :mod:`dinov2.cli`).
"""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in what the user supplied; ``str(error)`` is the text to show."""


class ConfigError(UserError, ValueError):
    """A config file, override or command-line option is wrong."""


class DatasetError(UserError, ValueError):
    """A dataset string, a folder or an index does not describe usable data."""


class ImageReadError(DatasetError, RuntimeError):
    """The image of one sample cannot be read or decoded; training may take another sample instead.

    Survives pickling, and so the way from a loader's worker to the main process.

    Args:
        message: the whole sentence.
        path: where the image lies, e.g. a file, a slide with coordinates or a member of an archive.
        reason: what is wrong with it, without the path; the whole message if nothing else is given.
    """

    def __init__(self, message: str = "", *, path: str = "", reason: str = "") -> None:
        super().__init__(message)
        self.path = path
        self.reason = reason or message


class UnsuitableImageError(ImageReadError):
    """An image was read, but is not what the run needs, such as too small for its crops."""


class UnreadableImagesError(DatasetError):
    """More images are unreadable than the run tolerates."""


class DataLoadingError(UserError, RuntimeError):
    """Reading data failed as a whole: a worker process died or stalled, or memory or file handles ran out."""


class WeightsError(UserError, RuntimeError):
    """A weight file cannot be read or does not fit the model."""


class CollapsedError(UserError, RuntimeError):
    """A run was ended because its features collapsed; its files are those of an end."""


class OutputError(UserError, OSError):
    """The output directory cannot be used."""


class Interrupted(Exception):  # noqa: N818 - nothing is wrong
    """The run was asked to stop (by a signal), has saved its state and goes on when it is started again.

    Args:
        message: one sentence: which signal, what is saved, how to go on.
        signal_number: the signal, such as ``signal.SIGTERM``.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


def nearest(name: str, accepted: Iterable[str], *, cutoff: float = 0.6) -> str:
    """Return ``' (did you mean "x"?)'`` for the accepted name closest to ``name``, or an empty string.

    Args:
        name: what was given.
        accepted: the names to choose from.
        cutoff: how alike two names must be, from 0 to 1 for the same.
    """
    match = difflib.get_close_matches(str(name), [str(item) for item in accepted], n=1, cutoff=cutoff)
    return f' (did you mean "{match[0]}"?)' if match else ""


def some_of(items: Iterable[object], limit: int, *, separator: str = ", ") -> str:
    """Return the first items for a sentence, and how many more there are: ``"a, b, c and 4 more"``."""
    texts = [str(item) for item in items]
    more = len(texts) - limit
    return separator.join(texts[:limit]) + (f" and {more} more" if more > 0 else "")


def counted(count: int, noun: str, *, thousands: str = "") -> str:
    """Return ``"1 slide"``, ``"2 slides"``; with ``thousands=","`` also ``"2,000 slides"``."""
    return f"{count:{thousands}} {noun}{'' if count == 1 else 's'}"


def printable(text: str) -> str:
    """Return a text that can be written as UTF-8: file names that are no text show as ``\\udcff``."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
