"""The tiles of many slides in memory-mapped files, found once in parallel processes."""

import hashlib
import json
import logging
import multiprocessing
import os
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dinov2.data.datasets.arrays import IndexArray, atomic_file, remove_leftovers, save_array
from dinov2.data.locks import one_at_a_time
from dinov2.data.slides.slide_tiles import TileSpec, fingerprint, load_tiles, store_tiles
from dinov2.data.slides.sources import SlideSource
from dinov2.errors import DatasetError, OutputError, some_of

logger = logging.getLogger("dinov2")

NO_LABEL = np.iinfo(np.int64).min
ROW_DTYPE = np.dtype(
    [
        ("begin", "<i8"),  # first tile
        ("count", "<i8"),  # tiles
        ("side", "<f8"),  # of a tile, level-0 pixels
        ("mpp", "<f8"),  # um per level-0 pixel
        ("label", "<i8"),
        ("path_begin", "<i8"),
        ("path_end", "<i8"),
    ]
)
_PROGRESS_SECONDS = 15.0
RETRY_SECONDS = 120  # the processes of one run open the slides within less
_SHOWN_FAILURES = 5


class SlideRow(NamedTuple):
    """A slide of a :class:`TileTable`."""

    path: str
    mpp: float
    side: float
    label: int | None


class TileTable:
    """Slides with at least one tile, and their tiles. Opening and pickling cost the same for any number.

    Args:
        stem: path of its files without ``.slides.npy``, ``.paths.npy``, ``.tiles.npy``.
    """

    def __init__(self, stem: str) -> None:
        renew = "delete the folder it lies in and start again"
        self._slides = IndexArray(f"{stem}.slides.npy", renew, ROW_DTYPE.names)
        self._paths = IndexArray(f"{stem}.paths.npy", renew)
        self._tiles = IndexArray(f"{stem}.tiles.npy", renew)

    @property
    def counts(self) -> np.ndarray:
        """Tiles of each slide, int64."""
        return self._slides.get()["count"]

    @property
    def labels(self) -> np.ndarray:
        """Label of each slide, int64, ``NO_LABEL`` without."""
        return self._slides.get()["label"]

    def slide(self, number: int) -> SlideRow:
        """Return a slide."""
        row = self._slides.get()[number]
        path = os.fsdecode(self._paths.get()[row["path_begin"] : row["path_end"]].tobytes())
        label = int(row["label"])
        return SlideRow(path, float(row["mpp"]), float(row["side"]), None if label == NO_LABEL else label)

    def corner(self, slide: int, tile: int) -> tuple[int, int]:
        """Return x and y of a tile in level-0 pixels."""
        x, y = self._tiles.get()[self._slides.get()["begin"][slide] + tile]
        return int(x), int(y)


def open_tile_table(sources: Sequence[SlideSource], spec: TileSpec, folder: str) -> TileTable:
    """Open the tiles of slides, after finding those that are not yet in ``folder``.

    Of several processes that ask at once one does the work, the others wait and take its result. A build that
    was stopped goes on where it was; a slide whose file has changed is done again, and so is one that failed
    when the table is opened ``RETRY_SECONDS`` after the last try.

    Args:
        sources: the slides.
        spec: which tiles are cut from them.
        folder: where the tiles are kept.

    Raises:
        DatasetError: no slide gives a tile.
        OutputError: the folder can not be written.
    """
    names = [fingerprint(source, spec) for source in sources]
    labels = [source.label for source in sources]
    digest = hashlib.blake2b(json.dumps([names, labels]).encode(), digest_size=12).hexdigest()
    stem = str(Path(folder, f"tiles-{digest}"))
    parts = [f"{folder}/slides/{name}.npz" for name in names]
    report = Path(f"{stem}.json")
    if not report.is_file():
        with one_at_a_time(Path(folder, ".lock"), what="the list of tiles") as alone:
            if alone:
                _remove_leftovers(stem, parts)
            if not report.is_file():
                _write(sources, parts, _find_missing(sources, spec, parts), stem)
    if _retry_is_due(report):
        with one_at_a_time(Path(folder, ".lock"), what="the list of tiles") as alone:
            if alone:
                _remove_leftovers(stem, parts)
            if _retry_is_due(report):  # not if another process has done it meanwhile
                try:
                    _retry(sources, spec, parts, stem)
                except OutputError as error:  # what was found before is there all the same
                    logger.warning("slides that can not be read were not tried again: %s", error)
    content = json.loads(report.read_text("utf-8"))
    _tell(content, report)
    return TileTable(str(report.with_name(content.get("table", Path(stem).name))))


def _remove_leftovers(stem: str, parts: list[str]) -> None:
    """Remove what killed processes have left of a table and of the slides in it."""
    remove_leftovers(stem)
    # The lock is the folder's, so nobody writes parts of other tables either.
    for leftover in Path(parts[0]).parent.glob(".*.npz.*.tmp"):
        leftover.unlink(missing_ok=True)


def _retry_is_due(report: Path) -> bool:
    """Whether slides failed, and not just now: the processes of one run have to find the same table."""
    if time.time() - report.stat().st_mtime < RETRY_SECONDS or not os.access(report.parent, os.W_OK):
        return False
    return bool(json.loads(report.read_text("utf-8"))["failed"])


def _retry(sources: Sequence[SlideSource], spec: TileSpec, parts: list[str], stem: str) -> None:
    """Try the slides again that failed: storage may have been away, or a library was missing."""
    report = Path(f"{stem}.json")
    before = json.loads(report.read_text("utf-8"))["failed"]
    failures = _find_missing(sources, spec, parts)
    if len(failures) < len(before):
        _write(sources, parts, failures, stem, table=f"{stem}.{uuid.uuid4().hex[:8]}")
    else:
        os.utime(report)


def _find_missing(sources: Sequence[SlideSource], spec: TileSpec, parts: list[str]) -> dict[str, str]:
    """Find the tiles of the slides that have none yet; return what was wrong, by path of the slide."""
    todo = [place for place, part in enumerate(parts) if not Path(part).is_file()]
    return _find_all([(sources[place], spec, parts[place]) for place in todo])


def _write(
    sources: Sequence[SlideSource], parts: list[str], failures: dict[str, str], stem: str, *, table: str = ""
) -> None:
    """Write a table and its report. A second table lies beside the first, which others may have open."""
    table = table or stem
    rows, paths, corners, begin, path_begin, empty = [], [], [], 0, 0, []
    for source, part in zip(sources, parts, strict=True):
        if source.path in failures:
            continue
        tiles = load_tiles(part)
        count, path = len(tiles.corners), os.fsencode(source.path)
        if not count:
            empty.append(source.path)
            continue
        label = NO_LABEL if source.label is None else source.label
        rows.append((begin, count, tiles.side, tiles.mpp, label, path_begin, path_begin + len(path)))
        paths.append(path)
        corners.append(tiles.corners)
        begin, path_begin = begin + count, path_begin + len(path)
    if not rows:
        raise DatasetError(_nothing(failures, empty))
    save_array(f"{table}.slides.npy", np.array(rows, dtype=ROW_DTYPE))
    save_array(f"{table}.paths.npy", np.frombuffer(b"".join(paths), dtype=np.uint8))
    save_array(f"{table}.tiles.npy", np.concatenate(corners))
    report = {"slides": len(rows), "tiles": begin, "empty": empty, "failed": failures}
    if table != stem:
        report["table"] = Path(table).name
    with atomic_file(f"{stem}.json") as file:  # last: the table is complete when it is there
        file.write(json.dumps(report, indent=1).encode("ascii"))


def _find_all(jobs: list[tuple[SlideSource, TileSpec, str]]) -> dict[str, str]:
    """Find the tiles of slides in parallel; return what was wrong, by path of the slide."""
    if not jobs:
        return {}
    processes = min(len(jobs), _usable_cores())
    logger.info("finding the tiles of %d slides in %d processes", len(jobs), processes)
    failures, died = _in_pool(jobs, processes)
    # One file that brings a library down breaks the pool for all; alone it can be told from the others.
    for job in died:
        failed_alone, died_alone = _in_pool([job], 1)
        failures |= failed_alone
        failures |= {source.path: "the process that read it died" for source, _, _ in died_alone}
    return failures


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _in_pool(jobs: list[tuple[SlideSource, TileSpec, str]], processes: int) -> tuple[dict[str, str], list]:
    """Return what was wrong by path of the slide, and the jobs that were lost with a process."""
    failures, died, told = {}, [], time.monotonic()
    # Forked as a loader's workers are; the children touch neither torch nor a device.
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("fork")) as pool:
        futures: dict[Future[str], tuple] = {pool.submit(store_tiles, *job): job for job in jobs}
        for done, future in enumerate(as_completed(futures), start=1):
            job = futures[future]
            try:
                problem = future.result()
            except BrokenProcessPool:
                died.append(job)
                continue
            if problem:
                failures[job[0].path] = problem
            if time.monotonic() - told > _PROGRESS_SECONDS:
                told = time.monotonic()
                logger.info("tiles found in %d of %d slides", done, len(jobs))
    return failures, died


def _nothing(failures: dict[str, str], empty: list[str]) -> str:
    first = next(iter(failures.values()), f'"{empty[0]}" has no tile with enough tissue' if empty else "")
    return (
        f"none of the {len(failures) + len(empty)} slides gives a tile: {len(failures)} can not be read and "
        f"{len(empty)} have no tile with enough tissue; the first: {first}"
    )


def _tell(report: dict, path: Path) -> None:
    logger.info("%d slides with %d tiles", report["slides"], report["tiles"])
    if report["empty"]:
        logger.warning(
            "%d slides have no tile with enough tissue and are left out: %s",
            len(report["empty"]),
            some_of(report["empty"], _SHOWN_FAILURES),
        )
    if report["failed"]:
        logger.warning(
            "LEFT OUT: %d slides can not be read (tried again when opened in more than %d minutes, or at "
            'once without "%s"): %s',
            len(report["failed"]),
            RETRY_SECONDS // 60,
            path,
            some_of(report["failed"].values(), _SHOWN_FAILURES, separator="; "),
        )
