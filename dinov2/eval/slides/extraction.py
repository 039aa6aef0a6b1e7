"""Features of the tiles of slides: one slide after the other, each complete or not there at all.

Shapes: B tiles per step, N tiles of a slide, D width.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from dinov2 import distributed
from dinov2.data.datasets.arrays import remove_leftovers, writing
from dinov2.data.loader_errors import WatchedLoader
from dinov2.data.slides.backends import AUTO
from dinov2.data.slides.output_folder import OutputFolder
from dinov2.data.slides.plan import TilePlan, reading_order
from dinov2.data.slides.reader import Slide
from dinov2.data.slides.recipe import TilingRecipe, differences
from dinov2.data.slides.resolution import ASSUMED
from dinov2.data.slides.slide_list import SlideEntry
from dinov2.data.slides.tile_many import sort_entries
from dinov2.data.slides.tiling import source_changes, stamp, wanted_record
from dinov2.data.workers import seed_worker, worker_generator
from dinov2.errors import ConfigError, UserError, WeightsError, counted
from dinov2.eval.extract import NamedFeatures
from dinov2.eval.feature_store import CLS, PATCH_MEAN, on_main_process
from dinov2.eval.slides.bag_files import BOTH, bag_names, page_name, to_disk, write_bag
from dinov2.eval.slides.scouting import Scouted, ScoutingOrder, reason_of, scout_ahead
from dinov2.eval.utils import device_of

logger = logging.getLogger("dinov2")

POOLS = {"cls": [CLS], "cls+mean": [CLS, PATCH_MEAN], "mean": [PATCH_MEAN]}
# Of all that cuts tiles to files, what decides the features of a slide.
_TILING_KEYS = ("mpp", "size", "overlap", "min_tissue", "edges", "max_tiles", "seed", "segmentation")
# Raised when the same slide and recipe would give other features.
VERSION = 1


@dataclass(frozen=True)
class Encoder:
    """What makes features of tiles.

    Args:
        model: a backbone.
        transform: from a tile as a picture to its input.
        identity: of the backbone, see :func:`~dinov2.eval.identity.identity_of`.
        transform_text: the transform, in words.
        arch: a name for the architecture.
        pool: ``cls``, ``mean`` (of the patch tokens) or ``cls+mean`` side by side.
        autocast_dtype: number format of the backbone.
    """

    model: nn.Module
    transform: Callable[[Any], Tensor]
    identity: dict[str, Any]
    transform_text: str
    arch: str
    pool: str = "cls"
    autocast_dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        """A short name that differs with the weights."""
        return f"{self.arch}-{self.identity['weights_sha256'][:12]}"

    def module(self) -> nn.Module:
        """Return the module that gives arrays (B, D) by name."""
        n_last_blocks = 0 if self.pool == "cls" else 1
        return NamedFeatures(self.model.eval(), n_last_blocks, self.autocast_dtype)

    def as_dict(self) -> dict[str, Any]:
        """Return all that decides its features, as plain values."""
        precision = str(self.autocast_dtype).removeprefix("torch.")
        return {
            **self.identity,
            "pool": self.pool,
            "precision": precision,
            "transform": self.transform_text,
        }


@dataclass(frozen=True)
class Extraction:
    """Which slides, how, and where to.

    Args:
        entries: the slides.
        order: how they are looked at and which tiles they have.
        encoder: makes the features.
        output: folder of the bags.
        format_name: of the bags, ``h5``, ``pt`` or ``both``.
        dtype: of the features on disk, ``float32`` or ``float16``.
        batch_size: tiles per step.
        workers: processes that read tiles; 0 does all in this one.
        redo: do slides again that have been done by another recipe.
    """

    entries: Sequence[SlideEntry]
    order: ScoutingOrder
    encoder: Encoder
    output: OutputFolder
    format_name: str = "h5"
    dtype: str = "float32"
    batch_size: int = 128
    workers: int = 4
    redo: bool = False

    def __post_init__(self) -> None:
        for name, value, least in (
            ("batch size", self.batch_size, 1),
            ("number of workers", self.workers, 0),
        ):
            if value < least:
                raise ConfigError(f"the {name} of the extraction is {value}; it takes {least} or more")

    @property
    def recipe(self) -> dict[str, Any]:
        """All choices that decide what is in the files, as plain values."""
        tiling = self.order.recipe.as_dict()
        choices = {
            "version": VERSION,
            "encoder": self.encoder.as_dict(),
            "tiles": {key: tiling[key] for key in _TILING_KEYS},
            "dtype": self.dtype,
            "format": self.format_name,
        }
        return json.loads(json.dumps(choices))  # as a record has it: lists for tuples


def extract_all(run: Extraction) -> list[dict]:
    """Extract all slides that are not done yet; return a record per slide; all processes call this together.

    The processes share out the slides by the size of their files. A slide that can not be used is recorded
    with the reason and does not stop the others.

    Raises:
        ConfigError: a slide has been done by another recipe, and ``redo`` is off.
        OutputError: the output folder can not be written.
        WeightsError: features are not finite.
    """
    todo, records = on_main_process(lambda: _sorted_out(run))
    if records:
        logger.info("%d of %s done or left out already", len(records), counted(len(run.entries), "slide"))
    own = dealt_out(todo, distributed.get_global_rank(), distributed.get_global_size())
    made = []
    for record in _extract(run, own):
        made.append(record)
        logger.info("[%d/%d] %s", len(made), len(own), _line_of(record))
    for part in distributed.all_gather_objects(made):
        records += part
    on_main_process(lambda: run.output.write_summary(records))
    return sorted(records, key=lambda record: record["slide"])


def dealt_out(sorted_slides: Sequence[Any], rank: int, size: int) -> list[Any]:
    """Return the share of one of ``size`` processes; the rounds go to and fro, which evens out sizes."""
    rounds = range(0, len(sorted_slides), size)
    places = [start + (size - 1 - rank if number % 2 else rank) for number, start in enumerate(rounds)]
    return [sorted_slides[place] for place in places if place < len(sorted_slides)]


def _sorted_out(run: Extraction) -> tuple[list[SlideEntry], list[dict]]:
    """Return the slides to do, large files first, and the records of the others."""
    todo, records = sort_entries(
        list(run.entries),
        run.output,
        lambda record, entry: _changes(record, entry, run),
        redo=run.redo,
        other_folder="--output-dir",
    )
    # What is recorded and has lost its files is done again.
    kept = []
    for record in records:
        lost = record["status"] == "done" and not all(
            (run.output.root / name).exists() for name in bag_names(record["slide"], run.format_name)
        )
        (todo if lost else kept).append(_entry_of(run, record) if lost else record)
    return sorted(todo, key=_bytes_of, reverse=True), kept


def _entry_of(run: Extraction, record: dict) -> SlideEntry:
    return next(entry for entry in run.entries if entry.name == record["slide"])


def _bytes_of(entry: SlideEntry) -> int:
    try:
        return wanted_record(entry, TilingRecipe())["source"]["bytes"]
    except UserError:
        return 0


def _changes(record: dict, entry: SlideEntry, run: Extraction) -> list[str]:
    """Name what a slide's record and what is wanted now differ in."""
    try:
        source = wanted_record(entry, run.order.recipe)["source"]
    except UserError:
        return []  # a slide that was done and has gone since stays done
    changes = differences(record.get("recipe") or {}, run.recipe)
    if record.get("mpp_source") == ASSUMED and record.get("slide_mpp") != run.order.assumed_mpp:
        changes.append(f"assumed mpp {record.get('slide_mpp')} -> {run.order.assumed_mpp}")
    # The automatic choice takes what is there; two libraries do not give the same pixels to the last bit.
    if run.order.backend != AUTO and record.get("backend") != run.order.backend:
        changes.append(f"backend {record.get('backend')} -> {run.order.backend}")
    return changes + source_changes(record.get("source") or {}, entry, source)


def _extract(run: Extraction, entries: Sequence[SlideEntry]) -> Iterator[dict]:
    features = run.encoder.module()
    for entry, scouted in scout_ahead(entries, run.order, in_process=run.workers == 0):
        begin = time.monotonic()
        reason, values = scouted.failure, None
        if not reason and len(scouted.plan):
            values, reason = _features_of(scouted, entry.name, features, run)
        if reason:
            record = {"status": "failed", "error": reason}
            _forget(run, entry.name)
        else:
            record = {"status": "empty" if values is None else "done", **scouted.facts}
            _publish(run, entry, scouted, values)
        record = {
            "slide": entry.name,
            **record,
            "seconds": round(time.monotonic() - begin, 2),
            "recipe": run.recipe,
            **({"source": scouted.source} if scouted.source else {}),
            **stamp(entry),
        }
        run.output.write_record(record)
        yield record


def _features_of(
    scouted: Scouted, name: str, features: nn.Module, run: Extraction
) -> tuple[np.ndarray | None, str]:
    """Return the features (N, D) of the tiles of a slide in their order; or None, and why there are none.

    Raises:
        WeightsError: they are not finite.
    """
    order = reading_order(scouted.plan, scouted.slide.level_downsamples[scouted.plan.level])
    batches = iter(_make_loader(scouted.slide, scouted.plan, order, run))
    parts = []
    with scouted.slide:
        for _ in range(0, len(order), run.batch_size):
            try:
                tiles = next(batches)
            except Exception as error:
                return None, reason_of(error)
            named = features(tiles.to(device_of(run.encoder.model), non_blocking=True))
            joined = torch.cat([named[key] for key in POOLS[run.encoder.pool]], dim=1)
            parts.append(joined.cpu().numpy().astype(run.dtype))
    found = np.concatenate(parts)
    values = np.empty_like(found)
    values[order] = found
    broken = ~np.isfinite(values).all(axis=1)
    if broken.any():
        raise WeightsError(
            f'the features of {int(broken.sum())} of the {len(values)} tiles of "{name}" are not finite in '
            f"{run.dtype}: check the weights, extract with --dtype float32, or compute in float32 with "
            "--opts compute_precision.teacher.backbone.mixed_precision.param_dtype=fp32"
        )
    return values, ""


class _Tiles(Dataset):
    """The tiles of a slide, ready for a model."""

    def __init__(
        self, slide: Slide, corners: np.ndarray, recipe: TilingRecipe, transform: Callable[[Any], Tensor]
    ) -> None:
        self.slide, self.corners, self.recipe, self.transform = slide, corners, recipe, transform

    def __len__(self) -> int:
        return len(self.corners)

    def __getitem__(self, index: int) -> Tensor:
        x, y = self.corners[index].tolist()
        return self.transform(self.slide.read(x, y, self.recipe.size, self.recipe.mpp))


def _make_loader(slide: Slide, plan: TilePlan, order: np.ndarray, run: Extraction) -> WatchedLoader:
    batches = -(-len(order) // run.batch_size)
    return WatchedLoader(
        _Tiles(slide, plan.corners, run.order.recipe, run.encoder.transform),
        sampler=order.tolist(),
        batch_size=run.batch_size,
        num_workers=min(run.workers, batches),
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=seed_worker,
        generator=worker_generator(0),
    )


def _forget(run: Extraction, name: str) -> None:
    """Remove what there is of a slide, its record first."""
    remove_leftovers(str(run.output.record_path(name)))
    with writing(str(run.output.root)):
        run.output.forget(name, [*bag_names(name, BOTH), page_name(name)])
        run.output.clear_work(name)


def _publish(run: Extraction, entry: SlideEntry, scouted: Scouted, values: np.ndarray | None) -> None:
    """Put the bag, if there are tiles, and the page of a slide in their places."""
    name = entry.name
    _forget(run, name)
    with writing(str(run.output.root)):
        made = run.output.work_folder(name)
        page = made / page_name(name)
        page.parent.mkdir(parents=True)
        page.write_bytes(scouted.page)
        to_disk(page)
        if values is not None:
            write_bag(
                made,
                name,
                run.format_name,
                values,
                scouted.plan.corners,
                attributes=scouted.attributes,
                encoder=run.encoder.name,
                recipe={**run.recipe, "backend": scouted.facts["backend"], "source": scouted.source},
            )
        run.output.publish(made, name, [*bag_names(name, BOTH), page_name(name)])


def _line_of(record: dict) -> str:
    """Return one line about a slide."""
    if record["status"] == "failed":
        return f"{record['slide']}: failed, {record['error']}"
    lack = f"; {record['error']}" if record.get("error") else ""
    tiles = counted(record["n_tiles"], "tile")
    return (
        f"{record['slide']}: {tiles}, {record['tissue_mm2']:g} mm2 of tissue, {record['seconds']:.1f} s{lack}"
    )
