"""Tiles one slide from beginning to end: tissue, grid, tiles or coordinates, contact sheet, record."""

import datetime
import socket
import time
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from dinov2.data.slides import contact_sheet, coordinates
from dinov2.data.slides.mask_files import read_mask
from dinov2.data.slides.output_folder import OutputFolder
from dinov2.data.slides.plan import TilePlan, UpsampledSlide, draw_tiles, plan_tiles
from dinov2.data.slides.reader import Slide, open_slide
from dinov2.data.slides.recipe import TilingRecipe, differences
from dinov2.data.slides.slide_list import SlideEntry
from dinov2.data.slides.tile_files import remove_tiles, write_tiles
from dinov2.data.slides.tissue import overview_side, segment_tissue
from dinov2.data.slides.tissue_mask import TissueMask
from dinov2.errors import DatasetError, counted

MIN_OVERVIEW = 1024  # pixels: a small slide is shown larger than tissue has to be looked for


@dataclass(frozen=True)
class Surveyed:
    """A slide with its tissue and its tiles to be, and the seconds that took."""

    overview: Image.Image
    mask: TissueMask
    plan: TilePlan


def wanted_record(entry: SlideEntry, recipe: TilingRecipe) -> dict:
    """Return the part of a record that decides whether a slide has been done as wanted.

    Raises:
        DatasetError: the file is missing.
    """
    path = Path(entry.path)
    if not path.exists():
        raise DatasetError(f'the slide "{entry.path}" is missing: correct its path, or take it off the list')
    source = {
        "bytes": path.stat().st_size,
        "modified": _modified(path),
        "mpp": entry.mpp,
        "mask": entry.mask_as_given or entry.mask,
    }
    if entry.mask and Path(entry.mask).exists():
        source["mask_modified"] = _modified(Path(entry.mask))
    return {"recipe": recipe.as_dict(), "source": source}


def source_changes(recorded: dict, entry: SlideEntry, wanted: dict) -> list[str]:
    """Name what the sources of a slide in a record and of :func:`wanted_record` differ in."""
    recorded = dict(recorded)
    if recorded.get("mask") == entry.mask:  # older records have the path behind the path map
        recorded["mask"] = wanted["mask"]
    # Older records have no times; a mask that has gone since changes nothing, as a slide that has gone.
    unknown = {key for key in ("modified", "mask_modified") if not (key in recorded and key in wanted)}
    before, after = (
        {key: value for key, value in facts.items() if key not in unknown} for facts in (recorded, wanted)
    )
    return differences(before, after, "slide ")


def _modified(path: Path) -> str:
    """Return when a file was changed, in whole seconds, which all file systems and copies keep."""
    changed = datetime.datetime.fromtimestamp(int(path.stat().st_mtime), datetime.timezone.utc)
    return changed.isoformat()


def outputs_of(slide: str, recipe: dict) -> list[str]:
    """Return what a slide leaves below the output folder, the tiles first."""
    parts = [f"coordinates/{slide}.csv", f"thumbnails/{slide}.jpg", f"masks/{slide}.png"]
    parts += [f"contact_sheets/{slide}.jpg"]
    if not recipe["coords_only"]:
        return [f"patches/{slide}", *parts]
    names = coordinates.hdf5_names(
        slide, TilingRecipe(**{key: recipe[key] for key in ("mpp", "size", "overlap")})
    )
    return [*names.values(), *parts]


def open_entry(entry: SlideEntry, recipe: TilingRecipe, backend: str) -> Slide:
    """Open a slide of the list."""
    if recipe.allow_upsampling:
        return UpsampledSlide(entry.path, mpp=entry.mpp, backend=backend)
    return open_slide(entry.path, mpp=entry.mpp, backend=backend)


def survey(slide: Slide, entry: SlideEntry, recipe: TilingRecipe) -> Surveyed:
    """Look at a whole slide and plan its tiles; writes nothing.

    Raises:
        DatasetError: the slide is coarser than the tiles, or its mask does not fit.
        ImageReadError: the slide can not be read.
    """
    side = overview_side(slide, recipe.segmentation.mpp)
    overview = slide.thumbnail(max_side=max(side, min(MIN_OVERVIEW, max(slide.dimensions))))
    if entry.mask:
        mask = read_mask(entry.mask, slide, mpp=recipe.segmentation.mpp)
    else:
        picture = overview if max(overview.size) == side else None
        mask = segment_tissue(slide, settings=recipe.segmentation, picture=picture)
    return Surveyed(overview, mask, plan_tiles(slide, mask, recipe))


def why_no_tile(slide: Slide, found: Surveyed, recipe: TilingRecipe) -> str:
    """Say why a slide gives no tile."""
    if len(found.plan.rejected):
        share = f"at least {recipe.min_tissue:.0%}" if recipe.min_tissue else "any"
        return f"none of the {counted(len(found.plan.rejected), 'place')} for a tile has {share} tissue"
    width, height = slide.bounds[2:]
    return (
        f"a tile of {recipe.size} px at {recipe.mpp:g} um is {found.plan.side} px of the slide wide, and the "
        f"scanned area is {width} x {height} px: make tiles smaller, or give --edges pad"
    )


def tile_slide(
    entry: SlideEntry, recipe: TilingRecipe, output: OutputFolder, *, backend: str = "auto"
) -> dict:
    """Tile a slide and move the result to its place; return its record, which is not written yet.

    Raises:
        UserError: the slide can not be used; nothing of it is left then.
    """
    begin = time.monotonic()
    wanted = wanted_record(entry, recipe)
    made = output.work_folder(entry.name)
    with open_entry(entry, recipe, backend) as slide:
        found = survey(slide, entry, recipe)
        kept, repeats = _make_tiles(slide, entry.name, found.plan, recipe, made)
        facts = facts_of(slide, found, kept, repeats, recipe)
        coordinates.write_csv(made / "coordinates" / f"{entry.name}.csv", kept)
        _write_pictures(slide, entry, found, kept, repeats, recipe, made, facts)
    outputs = outputs_of(entry.name, wanted["recipe"])
    output.forget(entry.name, outputs)
    output.publish(made, entry.name, outputs)
    seconds = round(time.monotonic() - begin, 2)
    status = "done" if len(kept) else "empty"
    return {"slide": entry.name, "status": status, **facts, "seconds": seconds, **wanted, **stamp(entry)}


def stamp(entry: SlideEntry) -> dict:
    """Return where and when a record was made."""
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {"path": entry.path, "host": socket.gethostname(), "finished": now}


def _make_tiles(
    slide: Slide, name: str, plan: TilePlan, recipe: TilingRecipe, made: Path
) -> tuple[TilePlan, np.ndarray]:
    """Write tiles or coordinates; return the tiles kept, and for each of the plan which one it repeats."""
    repeats = np.full(len(plan), -1, np.int64)
    if recipe.near_duplicates is None:
        kept = draw_tiles(plan, name, recipe)
    if not len(plan):
        return plan, repeats
    if recipe.coords_only:
        coordinates.write_hdf5(made, name, slide, kept, recipe)
        return kept, repeats
    folder = made / "patches" / name
    if recipe.near_duplicates is None:
        write_tiles(slide, name, kept, recipe, folder)
        return kept, repeats
    # Which tiles repeat others is known when all have been read; only then can some be drawn.
    repeats = write_tiles(slide, name, plan, recipe, folder)
    distinct = plan.take(repeats < 0)
    kept = draw_tiles(distinct, name, recipe)
    remove_tiles(name, distinct.take(~np.isin(distinct.numbers, kept.numbers)), recipe, folder)
    return kept, repeats


def facts_of(
    slide: Slide, found: Surveyed, kept: TilePlan, repeats: np.ndarray, recipe: TilingRecipe
) -> dict:
    """Return what a record tells of a slide and its tiles, as plain values.

    Args:
        slide, found, recipe: the slide, what was found on it, and how.
        kept: the tiles that are made.
        repeats: for each tile of the plan which one it repeats, -1 for none.
    """
    plan, mask = found.plan, found.mask
    return {
        "n_tiles": len(kept),
        "n_grid": len(plan) + len(plan.rejected),
        "n_tissue": len(plan),
        "n_near_duplicates": int((repeats >= 0).sum()),
        **({} if len(plan) else {"error": why_no_tile(slide, found, recipe)}),
        "n_padded": int(kept.edge.sum()),
        "tissue_mm2": round(mask.area_mm2, 4),
        "tissue_source": mask.source,
        "saturation_threshold": mask.threshold,
        "slide_mpp": slide.mpp,
        "mpp_source": slide.mpp_source,
        "dimensions": list(slide.dimensions),
        "patch_size_level0": plan.side,
        "level": plan.level,
        "backend": slide.backend,
    }


def _write_pictures(
    slide: Slide,
    entry: SlideEntry,
    found: Surveyed,
    kept: TilePlan,
    repeats: np.ndarray,
    recipe: TilingRecipe,
    made: Path,
    facts: dict,
) -> None:
    for folder in ("thumbnails", "masks", "contact_sheets"):
        (made / folder).mkdir()
    small = found.overview.copy()
    small.thumbnail((MIN_OVERVIEW, MIN_OVERVIEW), Image.Resampling.BOX)
    small.save(made / "thumbnails" / f"{entry.name}.jpg", quality=90)
    Image.fromarray(found.mask.mask).save(made / "masks" / f"{entry.name}.png")
    page = draw_page(slide, entry.name, found, kept, repeats, recipe, facts)
    page.save(made / "contact_sheets" / f"{entry.name}.jpg", quality=90)


def draw_page(
    slide: Slide,
    name: str,
    found: Surveyed,
    kept: TilePlan,
    repeats: np.ndarray,
    recipe: TilingRecipe,
    facts: dict,
) -> Image.Image:
    """Return the page to judge a slide by; arguments as of :func:`facts_of`, ``facts`` is its result."""
    twice = np.flatnonzero(repeats >= 0)
    numbers = found.plan.numbers
    captions = [f"{numbers[tile]} repeats {numbers[repeats[tile]]}" for tile in twice]
    rejected = contact_sheet.choose_rejected(
        found.plan,
        found.mask,
        contact_sheet.Samples(found.plan.corners[twice], captions),
        min_tissue=recipe.min_tissue,
    )
    heading = _heading(name, facts, recipe)
    return contact_sheet.draw_sheet(slide, found.overview, found.mask, kept, rejected, recipe, heading)


def _plain(name: str) -> str:
    """Return a name in the letters that Pillow's own font has: accents go, other signs are escaped."""
    letters = (char for char in unicodedata.normalize("NFKD", name) if not unicodedata.combining(char))
    return "".join(letters).encode("ascii", "backslashreplace").decode()


def _heading(name: str, facts: dict, recipe: TilingRecipe) -> list[str]:
    width, height = facts["dimensions"]
    threshold = facts["saturation_threshold"]
    drawn_out = facts["n_tissue"] - facts["n_near_duplicates"] - facts["n_tiles"]
    least = f"{recipe.min_tissue:.0%}" if recipe.min_tissue else "any"
    how = f"saturation above {threshold:.3f}" if threshold is not None else facts["tissue_source"]
    return [
        _plain(name),
        f"{width} x {height} px of {facts['slide_mpp']:g} um ({facts['mpp_source']}), {facts['backend']}; "
        f"tissue {facts['tissue_mm2']:g} mm2 ({how})",
        f"{facts['n_tiles']} tiles of {recipe.size} px at {recipe.mpp:g} um, overlap {recipe.overlap} px; "
        f"{facts['n_tissue']} of {facts['n_grid']} places hold {least} tissue; "
        f"{facts['n_near_duplicates']} near duplicates; {drawn_out} dropped by --max-tiles",
    ]
