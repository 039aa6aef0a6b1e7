"""Samples that can not be read: replaced one by one, counted for all processes, and the end of patience.

A worker replaces an unreadable sample (:func:`read_or_replace`) and hands the failure on beside the batch
(:class:`CollateDraws`); the training loop gives the failures and their number over all processes to
:class:`UnreadableImages`, which keeps the count. docs/broken_input.md states the rules.
"""

import csv
import errno
import logging
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dinov2 import distributed
from dinov2.errors import (
    ImageReadError,
    OutputError,
    UnreadableImagesError,
    UnsuitableImageError,
    printable,
    some_of,
)
from dinov2.utils.seeding import derive_seed

logger = logging.getLogger("dinov2")

UNREADABLE = "unreadable_images"  # the entry of a batch that has any; never reaches the model
FILE_NAME = "unreadable_images.tsv"
COLUMNS = ("path", "reason", "iteration", "rank")

MAX_ATTEMPTS = 32  # with half of all images unreadable, 1 in 4 billion draws ends here
LISTED = 5  # paths in an error
LOGGED = 10  # failures with a log line of their own, then only sums
TOLERATED = 10  # failures that no limit but 0 stops at, see `allowed_failures`
MISSING = os.strerror(errno.ENOENT).lower()
MAX_ROWS = 100_000  # of the file, some 15 MB


class Failure(NamedTuple):
    """An image that could not be read."""

    path: str
    reason: str

    def __str__(self) -> str:
        return printable(f"{self.path} ({self.reason})")


class Draw(NamedTuple):
    """A sample, and what could not be read before it was found."""

    sample: Any
    failures: list[Failure]


def replacement(seed: int, rank: int, position: int, attempt: int, count: int) -> int:
    """Return the index that takes the place of an unreadable sample: any of ``count``, with equal chances.

    Args:
        seed: of the run.
        rank: of the process.
        position: of the sample in the process's stream.
        attempt: 1 for the first replacement, 2 if that is unreadable as well, and so on.
        count: size of the dataset.
    """
    return derive_seed(seed, rank, position, attempt) % count


def read_or_replace(read: Callable[[int], Any], index: int, replace: Callable[[int], int]) -> Draw:
    """Return sample ``index``, or the first of its replacements that can be read.

    Args:
        read: index -> sample; raises :class:`~dinov2.errors.ImageReadError` for an unreadable image. Other
            errors pass.
        index: the sample.
        replace: attempt -> index of a replacement.

    Raises:
        UnreadableImagesError: ``MAX_ATTEMPTS`` replacements are unreadable, too.
    """
    failures: list[Failure] = []
    first, suitable = index, True
    for attempt in range(1, MAX_ATTEMPTS + 2):
        try:
            return Draw(read(index), failures)
        except ImageReadError as error:
            suitable = suitable and not isinstance(error, UnsuitableImageError)
            failures.append(Failure(error.path or f"sample {index}", " ".join(error.reason.split())))
        index = replace(attempt)
    raise UnreadableImagesError(
        f"can not {'read' if suitable else 'use'} image for sample {first}, nor one of {MAX_ATTEMPTS} others "
        f"drawn in its place: {_listed(failures)}{_advice(failures) if suitable else ''}"
    )


def _listed(failures: Sequence[Failure]) -> str:
    """Name some of the images with their reasons; a reason that all share is said once."""
    distinct = list(dict.fromkeys(failures))
    if len(distinct) == 1 or len({failure.reason for failure in distinct}) > 1:
        return some_of(distinct, LISTED)
    return printable(
        f"{distinct[0].reason} (so with all {len(distinct)} different images, such as {distinct[0].path})"
    )


def _advice(failures: Sequence[Failure]) -> str:
    advice = "; see whether the storage is there and its files are whole"
    if any(failure.reason == MISSING for failure in failures):
        advice += (
            "; the index may be older than the tiles: that of Pathology is built again with python -m "
            "dinov2.data.index"
        )
    return advice


class CollateDraws:
    """Collates the samples of :class:`Draw` s; their failures, if any, become the entry ``UNREADABLE``.

    Args:
        collate: list of samples -> batch, a dictionary.
    """

    def __init__(self, collate: Callable[[list[Any]], dict[str, Any]]) -> None:
        self.collate = collate

    def __call__(self, draws: list[Draw]) -> dict[str, Any]:
        batch = self.collate([draw.sample for draw in draws])
        failures = [failure for draw in draws for failure in draw.failures]
        return {**batch, UNREADABLE: failures} if failures else batch


def allowed_failures(limit: float, draws: int) -> float:
    """Return how many of ``draws`` may be unreadable; limit 0 allows none.

    That is what the limit lets expect and three standard deviations of it (of a Poisson distribution), but at
    least ``TOLERATED``. One bad image in a first batch of 64 is no evidence for more than one in a thousand;
    in the long run the deviations vanish beside the expectation.
    """
    expected = limit * draws
    return max(TOLERATED, expected + 3 * math.sqrt(expected)) if limit > 0 else 0


class UnreadableImages:
    """Counts, logs and lists the unreadable images of all processes; stops the run when they are too many.

    Every process has one and calls its methods with the same sums, so all of them stop together.

    Args:
        output_dir: where the main process appends to ``unreadable_images.tsv``.
        limit: ``train.max_bad_fraction``.
    """

    def __init__(self, output_dir: str | Path, limit: float) -> None:
        self.path = Path(output_dir) / FILE_NAME
        self.limit = limit
        self.failures = 0  # of all processes, since this start of the run
        self.samples = 0  # delivered, likewise
        self._first: dict[str, Failure] = {}  # by path
        self._rows = -1  # of the file; -1 until it is opened
        self._reported = 0

    @property
    def draws(self) -> int:
        """Images that all processes tried to read."""
        return self.samples + self.failures

    def update(self, iteration: int, failures: Sequence[Failure], *, samples: int, total: int) -> None:
        """Take in one iteration.

        Args:
            iteration: zero-based.
            failures: of this process.
            samples: in the batches of all processes together.
            total: number of failures of all processes; the same number everywhere.

        Raises:
            UnreadableImagesError: on every process, when the limit is exceeded.
            OutputError: (main process) the list can not be written.
        """
        self.samples += samples
        if not total:
            return
        self.failures += total
        by_rank = distributed.all_gather_objects(list(failures))
        found = [failure for of_rank in by_rank for failure in of_rank]
        for failure in found:
            if len(self._first) < LISTED:
                self._first.setdefault(failure.path, failure)
        if distributed.is_main_process():
            self._log(iteration, found)
            self._write(iteration, by_rank)
        if self.limit < 1 and self.failures > allowed_failures(self.limit, self.draws):
            raise UnreadableImagesError(self._verdict())

    def report(self) -> None:
        """Log the sums if they have changed since the last report."""
        if self.failures > self._reported:
            self._reported = self.failures
            logger.warning("%s; listed in %s", self._sums(), self.path)

    def _sums(self) -> str:
        return (
            f"{self.failures} of {self.draws} images drawn since the start could not be read "
            f"({100 * self.failures / self.draws:.3g} %)"
        )

    def _verdict(self) -> str:
        allowed = int(allowed_failures(self.limit, self.draws))
        first = ", ".join(map(str, self._first.values()))
        return (
            f"{self._sums()}, and train.max_bad_fraction {self.limit:g} allows {allowed} by now; "
            f'the first are {first}; "{self.path}" lists all: mend them, leave '
            "them out of the index, or raise train.max_bad_fraction"
        )

    def _log(self, iteration: int, found: Sequence[Failure]) -> None:
        before = self.failures - len(found)
        for failure in found[: max(0, LOGGED - before)]:
            logger.warning("iteration %d: another sample replaces the unreadable %s", iteration, failure)
        if before < LOGGED <= self.failures:
            logger.warning("further unreadable images are only counted here, and listed in %s", self.path)

    def _write(self, iteration: int, by_rank: Sequence[Sequence[Failure]]) -> None:
        rows = [(*failure, iteration, rank) for rank, found in enumerate(by_rank) for failure in found]
        try:
            self._append(rows)
        except OSError as error:
            raise OutputError(f'can not write "{self.path}" ({error.strerror}): make room for it') from error

    def _append(self, rows: list[tuple]) -> None:
        # Paths may hold undecodable bytes.
        options = {"newline": "", "encoding": "utf-8", "errors": "surrogateescape"}
        if self._rows < 0:
            self._rows = 0
            if self.path.exists():
                with self.path.open(**options) as file:
                    self._rows = max(0, sum(1 for _ in file) - 1)
        room = MAX_ROWS - self._rows
        if room <= 0:
            return
        with self.path.open("a", **options) as file:
            writer = csv.writer(file, delimiter="\t", lineterminator="\n")
            if file.tell() == 0:
                writer.writerow(COLUMNS)
            writer.writerows(rows[:room])
        self._rows += len(rows[:room])
        if len(rows) >= room:
            logger.warning("%s is full with %d rows; nothing more is added to it", self.path, MAX_ROWS)
