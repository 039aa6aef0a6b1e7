"""Looks at slides before their tiles are read: tissue, tiles, page; the next slide while one is in work."""

import io
import multiprocessing
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from dinov2.data.slides.coordinates import trident_attributes
from dinov2.data.slides.plan import TilePlan, draw_tiles
from dinov2.data.slides.reader import Slide, open_slide
from dinov2.data.slides.recipe import TilingRecipe
from dinov2.data.slides.slide_list import SlideEntry
from dinov2.data.slides.tiling import draw_page, facts_of, survey, wanted_record
from dinov2.data.workers import leave_signals_to_the_trainer
from dinov2.errors import UserError


@dataclass(frozen=True)
class ScoutingOrder:
    """How slides are looked at.

    Args:
        recipe: which tiles.
        backend: library that reads slides, see :func:`~dinov2.data.slides.reader.open_slide`.
        assumed_mpp: um per level-0 pixel of slides that do not say; None refuses them.
        try_tiles: read every tile, so that one that cannot be read is found out now.
    """

    recipe: TilingRecipe
    backend: str = "auto"
    assumed_mpp: float | None = None
    try_tiles: bool = False


@dataclass(frozen=True)
class Scouted:
    """What is known of a slide before its tiles are read.

    Attributes:
        slide: to read from; None if it can not be used.
        plan: its tiles, none if it has too little tissue.
        facts: for its record, as plain values; ``error`` says why there is no tile.
        attributes: of the coordinates, by the names of TRIDENT and ours about resolution.
        page: the page to judge it by, a PNG file.
        failure: why it can not be used, empty if it can.
        source: size, time and more of its files, taken before any of them was read; empty if there is none.
    """

    slide: Slide | None = None
    plan: TilePlan | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)
    page: bytes = b""
    failure: str = ""
    source: dict[str, Any] = field(default_factory=dict)


def scout(entry: SlideEntry, order: ScoutingOrder) -> Scouted:
    """Look at a slide; what is wrong with it is told in the result."""
    source: dict[str, Any] = {}
    try:
        # A file that is replaced while it is read then counts as changed at the next run.
        source = wanted_record(entry, order.recipe)["source"]
        return replace(_scouted(entry, order), source=source)
    except Exception as error:  # what a damaged slide makes of the libraries below is not known
        return Scouted(failure=reason_of(error), source=source)


def reason_of(error: Exception) -> str:
    """Return what befell a slide, in one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def _scouted(entry: SlideEntry, order: ScoutingOrder) -> Scouted:
    recipe = order.recipe
    with open_slide(entry.path, mpp=entry.mpp, backend=order.backend, assumed_mpp=order.assumed_mpp) as slide:
        found = survey(slide, entry, recipe)
        kept = draw_tiles(found.plan, entry.name, recipe)
        if order.try_tiles:
            for x, y in kept.corners.tolist():
                slide.read(x, y, recipe.size, recipe.mpp)
        repeats = np.full(len(found.plan), -1, np.int64)
        facts = facts_of(slide, found, kept, repeats, recipe)
        page = io.BytesIO()
        draw_page(slide, entry.name, found, kept, repeats, recipe, facts).save(page, "PNG")
        attributes = {
            **trident_attributes(entry.name, slide, kept, recipe),
            "mpp": recipe.mpp,
            "level0_mpp": slide.mpp,
            "mpp_source": slide.mpp_source,
            "edges": recipe.edges,
        }
        return Scouted(slide, kept, facts, attributes, page.getvalue())


def scout_ahead(
    entries: Iterable[SlideEntry], order: ScoutingOrder, *, in_process: bool = False
) -> Iterator[tuple[SlideEntry, Scouted]]:
    """Yield each slide with what :func:`scout` finds; the next one is looked at while one is in work.

    Every slide has a process of its own: one that takes it down does not touch the others.

    Args:
        entries: the slides, in this order.
        order: how to look.
        in_process: look in this process, when a slide is asked for.
    """
    if in_process:
        yield from ((entry, scout(entry, order)) for entry in entries)
        return
    started: list[tuple[SlideEntry, Future]] = []
    for entry in entries:
        started.append((entry, _start(entry, order)))
        if len(started) > 1:
            yield _result(*started.pop(0))
    for one in started:
        yield _result(*one)


def _start(entry: SlideEntry, order: ScoutingOrder) -> Future:
    # Forked like the loader's workers: it needs no import of its own, and never touches a device.
    executor = ProcessPoolExecutor(
        1, mp_context=multiprocessing.get_context("fork"), initializer=leave_signals_to_the_trainer
    )
    future = executor.submit(scout, entry, order)
    executor.shutdown(wait=False)
    return future


def _result(entry: SlideEntry, future: Future) -> tuple[SlideEntry, Scouted]:
    try:
        return entry, future.result()
    except BrokenProcessPool:
        return entry, Scouted(
            failure="the process that looked at it died; the file is damaged, or memory ran out"
        )
