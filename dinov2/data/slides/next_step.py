"""What to do with the output of a tiling run: the command that comes next, and what went out of date."""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from dinov2.data.slides.output_folder import OutputFolder
from dinov2.data.slides.recipe import TilingRecipe
from dinov2.data.slides.slide_list import SlideEntry


def next_step(output: OutputFolder, recipe: TilingRecipe, slides: str, entries: Sequence[SlideEntry]) -> str:
    """Return a line that names what to run on the tiles or coordinates of a run.

    Args:
        output: of the run.
        recipe: of the run.
        slides: the source of the slides as it was given.
        entries: the slides it names.
    """
    if recipe.coords_only:
        if slides.lower().endswith(".csv"):
            source = f"manifest={_value(slides)}"
        elif Path(slides).is_dir():
            source = f"root={_value(slides)}"
        else:
            source = f"root={_value(os.path.commonpath([Path(entry.path).parent for entry in entries]))}"
        grid = f"size={recipe.size}:mpp={recipe.mpp:g}"
        dataset = f"Slides:{source}:{grid}:coords={_value(str(output.root))}"
        return f"next, to train on them: train.dataset_path={shlex.quote(dataset)}"
    folder = shlex.quote(str(output.root))
    return f"next, list the tiles: python -m dinov2.data.index --root {folder} --extra {folder}"


def outdated_indexes(output: OutputFolder) -> list[str]:
    """Return the indexes in the output folder that were built before tiles of a slide came or went."""
    changed = output.patches.stat().st_mtime_ns  # a slide's folder is moved here, and away, as a whole
    indexes = sorted(output.root.glob("entries-*.npy"))
    return [str(path) for path in indexes if path.stat().st_mtime_ns < changed]


def _value(path: str) -> str:
    """Return a path as the value of a key in a dataset string."""
    for character, code in (("%", "%25"), (":", "%3A"), ("+", "%2B")):
        path = path.replace(character, code)
    return path
