"""Cuts whole-slide images into tiles: ``python -m dinov2.data.slides.tile --slides DIR --output DIR``."""

import argparse
import logging
import sys
from collections import Counter
from pathlib import Path

from dinov2 import cli
from dinov2.data.datasets.path_map import PathMap
from dinov2.data.slides.backends import check_backend
from dinov2.data.slides.grid import EDGES
from dinov2.data.slides.next_step import next_step, outdated_indexes
from dinov2.data.slides.output_folder import OutputFolder
from dinov2.data.slides.preview import preview
from dinov2.data.slides.recipe import FORMATS, TilingRecipe
from dinov2.data.slides.slide_list import list_slides
from dinov2.data.slides.tile_many import TilingRun, run_all
from dinov2.data.slides.tissue_options import add_tissue_options, tissue_settings_of
from dinov2.errors import ConfigError, counted, some_of


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line; its defaults are those of the recipe."""
    typed = Path(sys.argv[0])
    script = sys.argv[0] if typed.name == "tile_slides.py" else "python -m dinov2.data.slides.tile"
    usage = "%(prog)s --slides SLIDES --output OUTPUT [option ...]"  # not twenty lines above every mistake
    parser = argparse.ArgumentParser(prog=script, usage=usage, description=__doc__)
    recipe = TilingRecipe()
    parser.add_argument(
        "--slides", required=True, help="folder, pattern in quotes, file, or CSV with a column path"
    )
    parser.add_argument(
        "--path-map", default="", help="for the paths in the CSV: /old=/new,/other=/elsewhere"
    )
    parser.add_argument("--output", required=True, help="folder to write to; finished slides in it are kept")
    add = parser.add_argument_group("tiles").add_argument
    add("--mpp", type=float, default=recipe.mpp, help="um per pixel (default: %(default)s)")
    add("--size", type=int, default=recipe.size, help="side in pixels (default: %(default)s)")
    add("--overlap", type=int, default=recipe.overlap, help="pixels neighbours share (default: %(default)s)")
    add("--min-tissue", type=float, default=recipe.min_tissue, help="least share (default: %(default)s)")
    add("--edges", choices=EDGES, default=recipe.edges, help="tiles beyond the border (default: %(default)s)")
    add(
        "--format",
        type=_format,
        choices=FORMATS,
        default=recipe.format,
        help="of the files (default: %(default)s)",
    )
    add("--quality", type=int, default=recipe.quality, help="of JPEG, 1 to 100 (default: %(default)s)")
    add("--coords-only", action="store_true", help="write HDF5 coordinates for CLAM and TRIDENT, no tiles")
    add(
        "--near-duplicates",
        type=int,
        metavar="BITS",
        help="drop tiles whose hash differs in so few of 64 bits, 0 to 8, such as 4",
    )
    add("--max-tiles", type=int, metavar="N", help="tiles to keep of a slide, drawn at random")
    add("--seed", type=int, default=recipe.seed, help="of that draw (default: %(default)s)")
    add("--allow-upsampling", action="store_true", help="make tiles that are finer than the slide")
    add_tissue_options(parser)
    add = parser.add_argument_group("running").add_argument
    add("--workers", type=int, default=1, help="slides in work at once (default: %(default)s)")
    add("--backend", default="auto", help="openslide, tiffslide or auto (default: %(default)s)")
    add("--redo", action="store_true", help="make slides again that were done with other options")
    add("--skip-errors", action="store_true", help="exit status 0 even if slides failed")
    add("--dry-run", action="store_true", help="say what would be done and write nothing")
    return parser


def _format(name: str) -> str:
    return {"jpg": "jpeg"}.get(name.lower(), name.lower())


def recipe_of(args: argparse.Namespace) -> TilingRecipe:
    """Return the recipe that a command line asks for."""
    names = "mpp size overlap min_tissue edges format quality coords_only near_duplicates max_tiles seed"
    choices = {name: getattr(args, name) for name in [*names.split(), "allow_upsampling"]}
    return TilingRecipe(**choices, segmentation=tissue_settings_of(args))


def main(arguments: list[str] | None = None) -> None:
    """Tile the slides; exit status 1 if any failed."""
    args = get_args_parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    recipe = recipe_of(args)
    if args.workers < 1:
        raise ConfigError(f"--workers is {args.workers}; it takes 1 or more")
    check_backend(args.backend)
    entries = list_slides(args.slides, path_map=PathMap.parse(args.path_map))
    run = TilingRun(entries, recipe, OutputFolder(args.output), args.backend, args.workers, args.redo)
    if args.dry_run:
        failed = not preview(run)
    else:
        records = run_all(run, cli.say)
        failed = sum(record["status"] == "failed" for record in records)
        _conclude(run, records, args.slides)
    if failed and not args.skip_errors:
        sys.exit(1)


def _conclude(run: TilingRun, records: list[dict], slides: str) -> None:
    """Say what there is now and what comes next."""
    counts = Counter(record["status"] for record in records)
    total = sum(record.get("n_tiles", 0) for record in records)
    listed = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    cli.say(f"{counted(total, 'tile')}; slides: {listed}; see {run.output.root}/summary.csv")
    if total:
        cli.say(next_step(run.output, run.recipe, slides, run.entries))
    outdated = [] if run.recipe.coords_only else outdated_indexes(run.output)
    if outdated:
        cli.say(
            f"WARNING: {some_of(outdated, 3)} was built before tiles were made or removed: training would "
            "use the tiles it lists; build it again"
        )


if __name__ == "__main__":
    cli.run(main)
