"""Builds the index of a tile tree: lists every slide folder once, in parallel, and can be interrupted."""

import csv
import logging
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np

from dinov2.data.datasets.arrays import atomic_file, remove_leftovers
from dinov2.data.datasets.tile_index import IndexFiles, write_index
from dinov2.data.indexing.builder_lock import keep, only_builder
from dinov2.data.indexing.journal import Journal, Records
from dinov2.data.indexing.listing import Known, SlideRecord, list_slide
from dinov2.data.indexing.names import SUFFIXES
from dinov2.data.indexing.progress import BuildProgress
from dinov2.data.indexing.verify import LEVELS
from dinov2.data.indexing.workers import default_workers, results
from dinov2.data.locks import LockFile
from dinov2.errors import ConfigError, DatasetError, counted, nearest, some_of

logger = logging.getLogger("dinov2")

REASONS_SHOWN = 8


@dataclass
class BuildReport:
    """What a build has done.

    Attributes:
        tiles: in the index.
        slides: folders with tiles.
        listed: slides that were listed now.
        reused: slides taken over from an earlier or interrupted build, as their folder has not changed.
        skipped: number of files left out, by reason.
        seconds: that it took.
    """

    tiles: int = 0
    slides: int = 0
    listed: int = 0
    reused: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    def summary(self) -> str:
        """Return it in one sentence."""
        tiles, slides, listed, left_out = (
            counted(count, noun, thousands=",")
            for count, noun in (
                (self.tiles, "tile"),
                (self.slides, "slide"),
                (self.listed, "slide"),
                (self.skipped.total(), "file"),
            )
        )
        return (
            f"{tiles} of {slides} in {self.seconds:.1f} s ({listed} listed, {self.reused:,} unchanged; "
            f"{left_out} left out)"
        )


def build_index(
    folders: list[str],
    files: IndexFiles,
    *,
    workers: int | None = None,
    verify: str = "none",
    fresh: bool = False,
) -> BuildReport:
    """List the tiles of all slides in the patches folders and write their index.

    A slide that an earlier build has listed, and whose folder has not changed since, is not listed again,
    whether that build was killed or finished.

    Args:
        folders: the patches folders.
        files: of the index.
        workers: how many work at once, at most: threads where listing waits, processes to verify; up to 1
            means none but this one; None chooses.
        verify: ``none`` trusts the names, ``header`` opens every image, ``decode`` reads all its pixels.
        fresh: list every slide again; needed after files were changed in place.

    Raises:
        ConfigError: there is no such level, or the number of workers is negative.
        DatasetError: a patches folder can not be listed, or there are no tiles.
        OutputError: the index can not be written, or another process is building it.
    """
    start = time.monotonic()
    _check_options(verify, workers)
    workers = default_workers() if workers is None else workers
    with only_builder(files.lock) as lock:
        for path in (files.entries, files.names, files.next_names, files.skipped, files.journal):
            remove_leftovers(path)
        slides = [_slide_names(folder) for folder in folders]
        journal = Journal(files.journal)
        if fresh:
            journal.clear()
        report = BuildReport()
        records = _collect(folders, slides, journal, lock, report, workers, verify)
        _write(folders, slides, records, files, report)
        journal.compact(list(records.values()))
    report.seconds = time.monotonic() - start
    _log_skipped(report, files)
    return report


def _check_options(verify: str, workers: int | None) -> None:
    if verify not in LEVELS:
        raise ConfigError(f'verify is "{verify}"{nearest(verify, LEVELS)}; accepted are {", ".join(LEVELS)}')
    if workers is not None and workers < 0:
        raise ConfigError(f"workers is {workers}; give how many work at once, or 0 for one")


def _slide_names(folder: str) -> list[str]:
    """Return the sorted names of all that a patches folder holds; the index numbers slides so."""
    try:
        return sorted(os.listdir(folder))  # noqa: PTH208 - names, not paths
    except OSError as error:
        raise DatasetError(
            f'the patches folder "{folder}" can not be listed ({os.strerror(error.errno)}): see to its '
            "permissions, or correct entry.csv"
        ) from error


def _collect(
    folders: list[str],
    slides: list[list[str]],
    journal: Journal,
    lock: LockFile,
    report: BuildReport,
    workers: int,
    verify: str,
) -> Records:
    """Return the record of every slide, from the journal or from its folder."""
    earlier = journal.read()
    items = []
    for folder, names in dict(zip(folders, slides, strict=True)).items():
        for slide in names:
            record = earlier.get((folder, slide))
            known = Known(record.signature, record.verify) if record and record.signature else None
            items.append((folder, slide, verify, known))
    records: Records = {}
    with journal, BuildProgress(len(items)) as progress:

        def tick() -> None:
            keep(lock)
            progress.tick()

        with closing(results(_list_one, items, workers, tick, processes=verify != "none")) as found:
            for batch in found:
                new = [record for _, record in batch if record is not None]
                journal.append(new)
                report.listed += len(new)
                report.reused += len(batch) - len(new)
                taken = {key: record or earlier[key] for key, record in batch}
                records.update(taken)
                progress.advance(len(taken), sum(record.count for record in taken.values()))
    return records


def _list_one(
    folder: str, slide: str, verify: str, known: Known | None
) -> tuple[tuple[str, str], SlideRecord | None]:
    return (folder, slide), list_slide(folder, slide, verify, known)


def _write(
    folders: list[str], slides: list[list[str]], records: Records, files: IndexFiles, report: BuildReport
) -> None:
    in_order = [
        [records[folder, slide] for slide in names] for folder, names in zip(folders, slides, strict=True)
    ]
    report.skipped.update(reason for record in records.values() for _, reason in record.skipped)
    report.tiles = sum(record.count for of_folder in in_order for record in of_folder)
    report.slides = sum(record.count > 0 for of_folder in in_order for record in of_folder)
    _write_skipped(files.skipped, records)
    if not report.tiles:
        raise DatasetError(_no_tiles(folders, records, files))
    suffixes = [[record.suffix for record in of_folder] for of_folder in in_order]
    write_index(files, _rows(in_order), report.tiles, slides, suffixes)


def _rows(in_order: list[list[SlideRecord]]) -> Iterator[tuple[int, int, np.ndarray]]:
    for folder_number, of_folder in enumerate(in_order):
        for slide_number, record in enumerate(of_folder):
            if record.count:
                yield folder_number, slide_number, record.numbers


def _write_skipped(path: str, records: Records) -> None:
    """Write path and reason of every file that was left out; bytes that are no text stay what they are."""
    with atomic_file(path) as file:
        lines = csv.writer(_Encoder(file), lineterminator="\n")
        lines.writerow(("path", "reason"))
        for folder, slide in sorted(key for key, record in records.items() if record.skipped):
            for name, reason in records[folder, slide].skipped:
                lines.writerow((f"{folder}/{slide}/{name}".rstrip("/"), reason))


class _Encoder:
    """Takes text as file names carry it, and passes it on as bytes."""

    def __init__(self, file) -> None:
        self._file = file

    def write(self, text: str) -> None:
        self._file.write(text.encode("utf-8", "surrogateescape"))


def _no_tiles(folders: list[str], records: Records, files: IndexFiles) -> str:
    found = Counter(
        os.path.splitext(name)[1].lower() or "without suffix"  # noqa: PTH122 - a name, not a path
        for record in records.values()
        for name, _ in record.skipped
        if name
    )
    if any(slide.endswith(".h5") for _, slide in records):
        return (
            f"{some_of(folders, 3)} holds files .h5 with coordinates, but no tiles: read the tiles from the "
            "slides, with the dataset Slides:root=<folder of the slides>:coords=<folder of the .h5 files>"
        )
    listed = ", ".join(f"{count} {suffix}" for suffix, count in found.most_common(REASONS_SHOWN))
    return (
        f"Pathology finds no tile <slide>/<slide>_patch_<number>({'|'.join(SUFFIXES)}) "
        f"below {some_of(folders, 3)}{f'; it found {listed}' if listed else ''}: check entry.csv, or use "
        f'ImageFolder or CustomImageDataset for other names; "{files.skipped}" says why of every file'
    )


def _log_skipped(report: BuildReport, files: IndexFiles) -> None:
    total = report.skipped.total()
    if total:
        reasons = ", ".join(
            f"{count:,}: {reason}" for reason, count in report.skipped.most_common(REASONS_SHOWN)
        )
        logger.warning(
            'left out, as %s (%s); see "%s"',
            "1 file is no tile" if total == 1 else f"{total:,} files are no tiles",
            reasons,
            files.skipped,
        )
