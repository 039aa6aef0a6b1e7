"""What a tiling run would do, without doing any of it."""

from dinov2 import cli
from dinov2.data.slides.slide_list import SlideEntry
from dinov2.data.slides.tile_many import TilingRun, sort_out
from dinov2.data.slides.tiling import open_entry, survey, why_no_tile
from dinov2.errors import UserError, counted


def preview(run: TilingRun) -> bool:
    """Say what a run would do; return False if a slide can not be used.

    Raises:
        ConfigError: the run would be refused: slides have been done by another recipe, and ``redo`` is off.
    """
    todo, records = sort_out(run)
    if records:
        slides = counted(len(run.entries), "slide")
        cli.say(f"{len(records)} of {slides} done or left out already; to do: {len(todo)}")
    return all([_preview_slide(entry, run) for entry in todo])


def _preview_slide(entry: SlideEntry, run: TilingRun) -> bool:
    """Say what a slide would give; return False if it can not be used."""
    recipe = run.recipe
    again = "made again: " if run.output.read_record(entry.name) else ""
    try:
        with open_entry(entry, recipe, run.backend) as slide:
            found = survey(slide, entry, recipe)
            width, height = slide.dimensions
            tiles = counted(min(len(found.plan), recipe.max_tiles or len(found.plan)), "tile")
            lack = "" if len(found.plan) else f": {why_no_tile(slide, found, recipe)}"
            cli.say(
                f"{entry.name}: {again}{width} x {height} px of {slide.mpp:g} um ({slide.mpp_source}), "
                f"{found.mask.area_mm2:.3f} mm2 of tissue, {tiles} from level {found.plan.level}{lack}"
            )
    except UserError as error:
        cli.say(f"{entry.name}: failed, {error}")
        return False
    return True
