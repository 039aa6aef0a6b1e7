"""Extract the features of the tiles of whole slides, a bag per slide: see docs/slide_level.md.

Run as ``python -m dinov2.eval.slides.extract`` or under torchrun, where the processes share out the slides.
"""

import argparse
import csv
import io
import logging
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from dinov2 import cli, distributed
from dinov2.data.datasets.arrays import atomic_file
from dinov2.data.datasets.path_map import PathMap
from dinov2.data.slides.backends import check_backend
from dinov2.data.slides.grid import EDGES
from dinov2.data.slides.output_folder import OutputFolder
from dinov2.data.slides.recipe import TilingRecipe
from dinov2.data.slides.slide_list import SlideEntry, list_slides
from dinov2.data.slides.tissue_options import add_tissue_options, tissue_settings_of
from dinov2.data.transforms import MaybeToTensor, make_normalize_transform
from dinov2.errors import ConfigError, counted
from dinov2.eval.cli import make_model_parser
from dinov2.eval.feature_store import DTYPES, on_main_process, transform_text
from dinov2.eval.identity import identity_of
from dinov2.eval.other_models import refuse_other_models
from dinov2.eval.setup import setup_and_build_model
from dinov2.eval.slides.bag_files import FORMATS, check_format
from dinov2.eval.slides.extraction import POOLS, Encoder, Extraction, extract_all
from dinov2.eval.slides.scouting import ScoutingOrder

logger = logging.getLogger("dinov2")

SKIPPED = "skipped.csv"
SKIPPED_COLUMNS = ("slide", "path", "status", "reason")


def get_args_parser(
    description: str | None = None,
    parents: list[argparse.ArgumentParser] | None = None,
    add_help: bool = True,
) -> argparse.ArgumentParser:
    """Return the parser of the extraction."""
    parser = make_model_parser(
        description or "Write a bag of tile features per slide into the folder --output-dir",
        parents,
        add_help,
    )
    recipe = TilingRecipe()
    parser.add_argument(
        "--checkpoint",
        dest="pretrained_weights",
        default=argparse.SUPPRESS,
        help="Another name of --pretrained-weights",
    )
    parser.add_argument(
        "--slides", required=True, help="Folder, pattern in quotes, file, or CSV with a column path"
    )
    parser.add_argument(
        "--slides-path-map", default="", help="For the paths in the CSV: /old=/new,/other=/elsewhere"
    )
    add = parser.add_argument_group("tiles").add_argument
    add("--mpp", type=float, default=recipe.mpp, help="um per pixel (default: %(default)s)")
    add("--tile", type=int, default=recipe.size, help="Side in pixels (default: %(default)s)")
    add(
        "--resize",
        type=int,
        help="Side in pixels to which tiles are resized for the model (default: as they are)",
    )
    add("--overlap", type=int, default=recipe.overlap, help="Pixels neighbours share (default: %(default)s)")
    add("--min-tissue", type=float, default=recipe.min_tissue, help="Least share (default: %(default)s)")
    add("--edges", choices=EDGES, default=recipe.edges, help="Tiles beyond the border (default: %(default)s)")
    add("--max-tiles", type=int, metavar="N", help="Tiles to keep of a slide, drawn at random (default: all)")
    add("--seed", type=int, default=recipe.seed, help="Of that draw (default: %(default)s)")
    add("--assume-mpp", type=float, help="um per level-0 pixel of slides that do not say")
    add_tissue_options(parser)
    add = parser.add_argument_group("features").add_argument
    add("--pool", choices=tuple(POOLS), default="cls", help="Which tokens (default: %(default)s)")
    add("--dtype", choices=DTYPES, default="float32", help="Number format on disk (default: %(default)s)")
    add("--format", choices=FORMATS, default="h5", help="Of the bags (default: %(default)s)")
    add = parser.add_argument_group("running").add_argument
    add("--batch-size", type=int, default=128, help="Tiles per process and step (default: %(default)s)")
    add(
        "--workers",
        type=int,
        default=4,
        help="Processes that read tiles, per process; 0 for none (default: %(default)s)",
    )
    add("--backend", default="auto", help="openslide, tiffslide or auto (default: %(default)s)")
    add("--redo", action="store_true", help="Do slides again that were done with other options")
    add("--skip-errors", action="store_true", help="Exit status 0 even if slides failed")
    return parser


def tiling_of(args: argparse.Namespace) -> TilingRecipe:
    """Return which tiles a command line asks for."""
    names = ("mpp", "overlap", "min_tissue", "edges", "max_tiles", "seed")
    return TilingRecipe(
        size=args.tile, **{name: getattr(args, name) for name in names}, segmentation=tissue_settings_of(args)
    )


def make_tile_transform(tile: int, resize: int | None, **normalisation: list[float]) -> transforms.Compose:
    """Return the transform from a tile to the input of the model: resized if asked for, normalised.

    Args:
        tile: side of the tiles, pixels.
        resize: side of the input, pixels; None leaves tiles as they are.
        normalisation: ``mean`` and ``std``.
    """
    resized = resize is not None and resize != tile
    return transforms.Compose(
        [
            *([transforms.Resize((resize, resize), InterpolationMode.BICUBIC)] if resized else []),
            MaybeToTensor(),
            make_normalize_transform(**normalisation),
        ]
    )


def check_input_side(side: int, patch_size: int) -> None:
    """Refuse an input that does not divide into patches.

    Raises:
        ConfigError: it does not.
    """
    if side < patch_size or side % patch_size:
        fits = max(patch_size, side // patch_size * patch_size)
        raise ConfigError(
            f"the model takes patches of {patch_size} px, which {side} px do not divide into: give "
            f"--resize {fits}, or a --tile that does"
        )


def main(args: argparse.Namespace) -> None:
    """Extract as the command line says; exit status 1 if a slide failed."""
    tiling = tiling_of(args)
    check_format(args.format)
    check_backend(args.backend)
    refuse_other_models([args.pretrained_weights], "The extraction from slides")
    entries = list_slides(args.slides, path_map=PathMap.parse(args.slides_path_map))
    model, autocast_dtype = setup_and_build_model(args)
    # The same tiles shall give the same bits when a stopped run is started again.
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    check_input_side(args.resize or args.tile, model.patch_size)
    transform = make_tile_transform(args.tile, args.resize, **args.normalisation)
    encoder = Encoder(
        model,
        transform,
        identity_of(model),
        transform_text(transform),
        args.model_config["arch"],
        args.pool,
        autocast_dtype,
    )
    run = Extraction(
        entries,
        ScoutingOrder(tiling, args.backend, args.assume_mpp),
        encoder,
        OutputFolder(args.output_dir),
        args.format,
        args.dtype,
        args.batch_size,
        args.workers,
        args.redo,
    )
    records = extract_all(run)
    on_main_process(lambda: write_skipped(run.output.root / SKIPPED, records, entries))
    _conclude(records, run.output.root)
    if any(record["status"] == "failed" for record in records) and not args.skip_errors:
        sys.exit(1)


def write_skipped(path: Path, records: Iterable[dict], entries: Iterable[SlideEntry]) -> None:
    """Write the slides that have no bag, and why, as CSV."""
    paths = {entry.name: entry.path for entry in entries}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(SKIPPED_COLUMNS)
    for record in records:
        if record["status"] != "done":
            name = record["slide"]
            writer.writerow([name, paths.get(name, ""), record["status"], record.get("error", "")])
    with atomic_file(str(path)) as file:
        file.write(text.getvalue().encode("utf-8", "surrogateescape"))


def _conclude(records: list[dict], root: Path) -> None:
    counts = Counter(record["status"] for record in records)
    tiles = sum(record.get("n_tiles", 0) for record in records)
    listed = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    if distributed.is_main_process():
        lacking = f", and {root / SKIPPED} for reasons" if counts["done"] < len(records) else ""
        cli.say(f"{counted(tiles, 'tile')}; slides: {listed}; see {root / 'summary.csv'}{lacking}")


if __name__ == "__main__":
    cli.run(main, get_args_parser().parse_args(sys.argv[1:]))
