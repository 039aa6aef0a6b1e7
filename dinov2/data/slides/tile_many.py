"""Tiles many slides, a process for each: a slide that takes its process down does not touch the others."""

import logging
import multiprocessing
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import connection

from dinov2.data.locks import RENEW_SECONDS, LockFile
from dinov2.data.slides.output_folder import DONE, OutputFolder
from dinov2.data.slides.recipe import TilingRecipe, differences
from dinov2.data.slides.slide_list import SlideEntry
from dinov2.data.slides.tiling import outputs_of, source_changes, stamp, tile_slide, wanted_record
from dinov2.errors import ConfigError, UserError, counted, some_of

logger = logging.getLogger("dinov2")

# Imported once, not for every slide; packages that are missing are passed over.
PRELOAD = [__name__, "scipy.ndimage", "openslide", "PIL.JpegImagePlugin", "PIL.PngImagePlugin"]

# Exit statuses of a slide's process, next to 0 for "its record is written".
BUSY = 3
LOST_LOCK = 4


@dataclass(frozen=True)
class TilingRun:
    """A list of slides and what to do with them.

    Args:
        entries: the slides.
        recipe: for all of them.
        output: folder of the results.
        backend: library that reads slides, see :func:`~dinov2.data.slides.reader.open_slide`.
        workers: slides in work at once.
        redo: make slides again that have been done by another recipe.
    """

    entries: list[SlideEntry]
    recipe: TilingRecipe
    output: OutputFolder
    backend: str = "auto"
    workers: int = 1
    redo: bool = False


def run_all(run: TilingRun, report: Callable[[str], None]) -> list[dict]:
    """Tile all slides that are not done yet; return a record per slide of the list.

    Args:
        run: what to do.
        report: called with a line of text per slide.

    Raises:
        ConfigError: a slide has been done by another recipe, and ``redo`` is off.
        OutputError: the output folder can not be written.
    """
    run.output.start(index=not run.recipe.coords_only)
    todo, records = sort_out(run)
    if records:
        slides = counted(len(run.entries), "slide")
        report(f"{len(records)} of {slides} done or left out already")
    for record in _work(run, todo):
        records.append(record)
        report(f"[{len(records)}/{len(run.entries)}] {describe(record)}")
    run.output.write_summary(records)
    return records


def describe(record: dict) -> str:
    """Return one line about a slide."""
    if record["status"] in DONE:
        tiles = counted(record["n_tiles"], "tile")
        lack = f"; {record['error']}" if record.get("error") else ""
        tissue = f"{record['tissue_mm2']:g} mm2 of tissue"
        return f"{record['slide']}: {tiles}, {tissue}, {record['seconds']:.1f} s{lack}"
    return f"{record['slide']}: {record['status']}, {record['error']}"


def sort_out(run: TilingRun) -> tuple[list[SlideEntry], list[dict]]:
    """Return the slides to do and the records of the others.

    Raises:
        ConfigError: a slide has been done by another recipe, and ``redo`` is off.
    """
    return sort_entries(
        run.entries,
        run.output,
        lambda record, entry: _changes(record, entry, run.recipe),
        redo=run.redo,
        other_folder="--output",
    )


def sort_entries(
    entries: list[SlideEntry],
    output: OutputFolder,
    changes_of: Callable[[dict, SlideEntry], list[str]],
    *,
    redo: bool,
    other_folder: str,
) -> tuple[list[SlideEntry], list[dict]]:
    """Return the slides to do and the records of the others.

    Args:
        entries: the slides of the list.
        output: where their records are.
        changes_of: names what differs between a record and what is wanted of a slide now.
        redo: do slides again that have been done by another recipe.
        other_folder: the option that names the folder, for the sentence that refuses.

    Raises:
        ConfigError: a slide has been done by another recipe, and ``redo`` is off.
    """
    todo, records, others = [], [], []
    for entry in entries:
        if not entry.process:
            records.append({"slide": entry.name, "status": "skipped", "error": "process is 0"})
            continue
        record = output.read_record(entry.name)
        if record is None or record["status"] not in DONE:
            todo.append(entry)
            continue
        changes = changes_of(record, entry)
        if not changes:
            records.append(record)
        elif redo:
            todo.append(entry)
        else:
            others.append(f"{entry.name} ({', '.join(changes)})")
    if others:
        raise ConfigError(
            f'in "{output.root}" there are slides done otherwise than asked for now: '
            f"{some_of(others, 3, separator='; ')}: give the same options, another {other_folder}, or --redo"
        )
    return todo, records


def _changes(record: dict, entry: SlideEntry, recipe: TilingRecipe) -> list[str]:
    try:
        wanted = wanted_record(entry, recipe)
    except UserError:
        return []  # a slide that was done and has gone since stays done
    options = differences(record.get("recipe") or {}, wanted["recipe"])
    return options + source_changes(record.get("source") or {}, entry, wanted["source"])


def _work(run: TilingRun, todo: list[SlideEntry]) -> Iterator[dict]:
    """Run a process per slide, ``run.workers`` at a time; yield the record of each when it ends."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    waiting = list(reversed(todo))
    running: dict[int, tuple[multiprocessing.process.BaseProcess, SlideEntry]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < max(1, run.workers):
                entry = waiting.pop()
                process = context.Process(target=_tile_one, args=(entry, run), name=entry.name)
                process.start()
                running[process.sentinel] = (process, entry)
            for sentinel in connection.wait(list(running)):
                process, entry = running.pop(sentinel)
                process.join()
                yield _record_after(process.exitcode, entry, run)
    finally:
        for process, _ in running.values():
            process.terminate()
            process.join()


def _record_after(status: int, entry: SlideEntry, run: TilingRun) -> dict:
    """Return the record of a slide whose process has ended, and write it where the process could not."""
    record = run.output.read_record(entry.name)
    if status in (BUSY, LOST_LOCK):
        if record is not None and record["status"] in DONE:
            return record
        return {"slide": entry.name, "status": "skipped", "error": "another process works on it"}
    if status == 0 and record is not None:
        return record
    cause = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
    record = _failed(entry, run.recipe, f"its process ended without a result ({cause})")
    lock = LockFile(run.output.lock_path(entry.name))
    if lock.acquire():
        _record_failure(record, run)
        lock.release()
    return record


def _record_failure(record: dict, run: TilingRun) -> None:
    """Remove what there is of a slide, finished or not, and write why it failed."""
    run.output.forget(record["slide"], outputs_of(record["slide"], record["recipe"]))
    run.output.clear_work(record["slide"])
    run.output.write_record(record)


def _failed(entry: SlideEntry, recipe: TilingRecipe, error: str) -> dict:
    return {
        "slide": entry.name,
        "status": "failed",
        "error": error,
        "recipe": recipe.as_dict(),
        **stamp(entry),
    }


def _tile_one(entry: SlideEntry, run: TilingRun) -> None:
    """What the process of a slide does; leaves a record unless another process has the slide."""
    lock = LockFile(run.output.lock_path(entry.name))
    try:
        if not lock.acquire():
            os._exit(BUSY)
    except UserError as error:
        run.output.write_record(_failed(entry, run.recipe, str(error)))
        return
    threading.Thread(target=_watch, args=(lock,), daemon=True).start()
    begin = time.monotonic()
    before = run.output.read_record(entry.name)
    if before and before["status"] in DONE and not _changes(before, entry, run.recipe):
        lock.release()  # done by another machine since this run looked
        return
    try:
        _drop_other_recipe(before, entry, run)
        record = tile_slide(entry, run.recipe, run.output, backend=run.backend)
    except Exception as error:
        text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        record = _failed(entry, run.recipe, text) | {"seconds": round(time.monotonic() - begin, 2)}
        logger.debug("%s failed", entry.name, exc_info=True)
    if not lock.owned():
        os._exit(LOST_LOCK)
    if record["status"] == "failed":
        _record_failure(record, run)
    else:
        run.output.write_record(record)
    lock.release()


def _drop_other_recipe(before: dict | None, entry: SlideEntry, run: TilingRun) -> None:
    """Remove what an earlier recipe has left under other names, such as another magnification's folder."""
    if before and before.get("recipe") and before["status"] in DONE:
        run.output.forget(entry.name, outputs_of(entry.name, before["recipe"]))


def _watch(lock: LockFile) -> None:
    """Renew the lock, and end this process if its parent has gone: nobody would wait for the result."""
    parent = multiprocessing.parent_process()
    while not connection.wait([parent.sentinel], timeout=RENEW_SECONDS):
        lock.renew()
    logger.error(
        "the process that started the work on %s has gone (%s)", lock.path.stem, socket.gethostname()
    )
    os._exit(1)
