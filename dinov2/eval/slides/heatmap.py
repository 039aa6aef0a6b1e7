"""Where an aggregator looked: the attention over a slide as a picture, and as GeoJSON for QuPath.

    python -m dinov2.eval.slides.heatmap --bag BAG.h5 --model OUT/model_fold_0.pt --output-dir OUT

docs/slide_protocol.md describes the files. Letter: N tiles.
"""

import argparse
import json
import logging
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from dinov2 import cli
from dinov2.data.slides.reader import Slide, open_slide
from dinov2.errors import ConfigError, DatasetError, OutputError
from dinov2.eval.pictures.files import PictureFolder
from dinov2.eval.slides.bags import Bag, encoder_of, read_bag
from dinov2.eval.slides.models import TrainedAggregator, load_model

logger = logging.getLogger("dinov2")

# Blue, white and red at the percentiles 0, 50 and 100.
RAMP = np.array([(33, 102, 172), (247, 247, 247), (178, 24, 43)], dtype=float)
MAX_SIDE = 2048  # pixels of the overlay
OPACITY = 0.5
BANDS = 10  # classes in QuPath, a tenth of the tiles each
SHEET_TILES, SHEET_PIXELS = 8, 224


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = argparse.ArgumentParser(description="Attention of a trained aggregator over a slide")
    parser.add_argument("--bag", required=True, help="Bag with coordinates, such as a .h5 of an extraction")
    parser.add_argument("--model", required=True, help="model_fold_<n>.pt of dinov2.eval.slides.train")
    parser.add_argument("--slide", help="The slide file (default: none, tiles on a blank canvas, no sheet)")
    parser.add_argument("--assume-mpp", type=float, help="um per level-0 pixel of a slide that does not say")
    parser.add_argument(
        "--tile-level0",
        type=int,
        help="Side of a tile in level-0 pixels (default: patch_size_level0 of the bag)",
    )
    parser.add_argument(
        "--output-dir", required=True, help="Files go into its folder pictures, which a report shows"
    )
    return parser


def main(args: argparse.Namespace) -> list[Path]:
    """Write the files of a slide and return their paths."""
    bag, trained = read_bag(args.bag, dtype=torch.float32), load_model(args.model)
    attention = attention_of(trained, bag)
    side = side_of_tile(bag, args.tile_level0)
    corners = bag.coords.numpy()
    ranks = percentiles(attention)
    out = Path(args.output_dir) / "pictures"
    with ExitStack() as stack:
        slide = stack.enter_context(open_slide(args.slide, mpp=args.assume_mpp)) if args.slide else None
        if slide is not None:
            check_slide(bag, slide)
        pictures = {f"{bag.name}_attention": draw_overlay(corners, side, ranks, slide)}
        captions = {
            f"{bag.name}_attention": f"Attention of {Path(args.model).name} over {bag.name}: red where it "
            f"looks most, blue where least, by rank among {len(corners)} tiles."
        }
        if slide is not None:
            pictures[f"{bag.name}_tiles"] = draw_tiles(corners, side, attention, slide)
            captions[f"{bag.name}_tiles"] = (
                f"Tiles of {bag.name} with the most attention (above) and the least (below), extremes first."
            )
    text = json.dumps(geojson(corners, side, attention, ranks))
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{bag.name}_attention.geojson").write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f'"{out}" cannot be written ({error}): choose another --output-dir') from error
    folder = PictureFolder(out, [f"{bag.name}_{kind}" for kind in ("attention", "tiles")])
    folder.clear()
    for name, picture in pictures.items():
        folder.add(name, picture, (), captions[name])
    names = [*(f"{name}.png" for name in pictures), f"{bag.name}_attention.geojson"]
    cli.say(f"{len(corners)} tiles: {', '.join(names)} in {out}")
    return [out / name for name in names]


@torch.no_grad()
def attention_of(trained: TrainedAggregator, bag: Bag) -> np.ndarray:
    """Return the attention of each tile of a bag with coordinates, float64 (N,), sum 1.

    Raises:
        ConfigError: the aggregator gives none.
        DatasetError: the bag has no coordinates, or features of another width or encoder than the model's.
    """
    if bag.features.shape[1] != trained.width:
        raise DatasetError(
            f'the bag "{bag.name}" has features of the width {bag.features.shape[1]}, the model takes '
            f"{trained.width}: extract the slide with the backbone of the training bags"
        )
    encoder = encoder_of(bag.attributes)
    if encoder and trained.encoder and encoder != trained.encoder:
        raise DatasetError(
            f'the bag "{bag.name}" has features of the encoder {encoder}, the model takes those of '
            f"{trained.encoder}: extract the slide with the backbone of the training bags"
        )
    if bag.coords is None:
        raise DatasetError(
            f'the bag "{bag.name}" has no coordinates, which a map needs: give the .h5 file of the extraction'
        )
    attention = trained.model(bag.features).attention
    if attention is None:
        raise ConfigError(
            f'the aggregator "{trained.aggregator}" has no attention: give a model of abmil or transformer'
        )
    return attention.double().numpy()


def side_of_tile(bag: Bag, given: int | None) -> int:
    """Return the side of a tile in level-0 pixels, the given one or that of the bag.

    Raises:
        ConfigError: neither is there, or it is not positive.
    """
    side = bag.attributes.get("patch_size_level0") if given is None else given
    if side is None or not side > 0:
        raise ConfigError(
            f'the side of the tiles of "{bag.name}" is {side or "not in the bag"}: give --tile-level0 in '
            "level-0 pixels, more than 0"
        )
    return int(side)


def check_slide(bag: Bag, slide: Slide) -> None:
    """Stop at a slide that is not the bag's: of another size than the bag says, or with tiles outside it.

    Raises:
        DatasetError: it is another one.
    """
    of_bag = tuple(bag.attributes.get(f"level0_{name}") for name in ("width", "height"))
    if None not in of_bag and of_bag != tuple(slide.dimensions):
        raise DatasetError(
            f'the bag "{bag.name}" is of a slide of {of_bag[0]} x {of_bag[1]} px, "{slide.path}" has '
            f"{slide.dimensions[0]} x {slide.dimensions[1]} px: give the slide of this bag"
        )
    corners = bag.coords.numpy()
    outside = ((corners < 0) | (corners >= np.array(slide.dimensions))).any(axis=1)
    if outside.any():
        x, y = corners[outside.argmax()]
        raise DatasetError(
            f'{int(outside.sum())} of {len(corners)} tiles, such as ({x}, {y}), lie outside "{slide.path}" '
            f"of {slide.dimensions[0]} x {slide.dimensions[1]} px: give the slide of this bag"
        )


def percentiles(attention: np.ndarray) -> np.ndarray:
    """Return the percentile rank of each value within the slide, 0 to 100; equal values share the mean."""
    values, place, counts = np.unique(attention, return_inverse=True, return_counts=True)
    if len(values) == 1:
        return np.full(len(attention), 50.0)
    mean_rank = counts.cumsum() - (counts + 1) / 2
    return 100 * mean_rank[place] / (len(attention) - 1)


def colours(ranks: np.ndarray) -> np.ndarray:
    """Return red, green and blue (N, 3), 0 to 255, of percentile ranks (N,)."""
    stops = np.linspace(0, 100, len(RAMP))
    return np.stack([np.interp(ranks, stops, channel) for channel in RAMP.T], axis=1).round().astype(int)


def draw_overlay(corners: np.ndarray, side: int, ranks: np.ndarray, slide: Slide | None) -> Image.Image:
    """Return the tiles in the colours of their ranks, half transparent over the slide, or on white."""
    size = slide.dimensions if slide else tuple((corners.max(axis=0) + side).tolist())
    scale = min(1.0, MAX_SIDE / max(size))
    pixels = tuple(max(1, round(length * scale)) for length in size)
    if slide is None:
        base = Image.new("RGB", pixels, "white")
    else:
        base = slide.thumbnail(max_side=max(pixels)).convert("RGB").resize(pixels)
    layer = base.copy()
    draw = ImageDraw.Draw(layer)
    for (x, y), colour in zip(corners, colours(ranks).tolist(), strict=True):
        # The last pixel belongs to the rectangle.
        left, top = int(x * scale), int(y * scale)
        right, bottom = max(left, int((x + side) * scale) - 1), max(top, int((y + side) * scale) - 1)
        draw.rectangle((left, top, right, bottom), fill=tuple(colour))
    return Image.blend(base, layer, OPACITY) if slide else layer


def draw_tiles(corners: np.ndarray, side: int, attention: np.ndarray, slide: Slide) -> Image.Image:
    """Return the most attended tiles in the upper row and the least attended in the lower, extremes first."""
    count = min(SHEET_TILES, len(corners))
    order = np.argsort(-attention, kind="stable")
    sheet = Image.new("RGB", (count * SHEET_PIXELS, 2 * SHEET_PIXELS), "white")
    pixels = min(side, SHEET_PIXELS)  # slides are not read finer than they are
    for row, chosen in enumerate((order[:count], order[::-1][:count])):
        for column, tile in enumerate(chosen):
            x, y = corners[tile].tolist()
            picture = slide.read(x, y, pixels, slide.mpp * side / pixels).resize((SHEET_PIXELS, SHEET_PIXELS))
            sheet.paste(picture, (column * SHEET_PIXELS, row * SHEET_PIXELS))
    return sheet


def geojson(corners: np.ndarray, side: int, attention: np.ndarray, ranks: np.ndarray) -> dict[str, Any]:
    """Return a FeatureCollection of a detection per tile, a square in level-0 pixels, as QuPath imports it.

    Attention and percentile are measurements; the classification is the tenth of the slide's tiles.
    """
    bands = np.minimum(ranks * BANDS // 100, BANDS - 1).astype(int)
    middle = colours((np.arange(BANDS) + 0.5) * 100 / BANDS).tolist()
    features = []
    for (x, y), value, rank, band in zip(corners.tolist(), attention, ranks, bands, strict=True):
        ring = [[x, y], [x + side, y], [x + side, y + side], [x, y + side], [x, y]]
        low, high = 100 * band // BANDS, 100 * (band + 1) // BANDS
        features.append(
            {
                "type": "Feature",
                "geometry": {"type": "Polygon", "coordinates": [ring]},
                "properties": {
                    "objectType": "detection",
                    "classification": {"name": f"attention {low}-{high} %", "color": middle[band]},
                    "measurements": {"attention": float(value), "percentile": float(rank)},
                },
            }
        )
    return {"type": "FeatureCollection", "features": features}


if __name__ == "__main__":
    cli.run(main, get_args_parser().parse_args(sys.argv[1:]))
