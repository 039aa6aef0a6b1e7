"""Hands a backbone to other programs: ``python -m dinov2.hub.export --checkpoint X --to timm --output DIR``.

Every export is what the other program reads by itself, and gives the features of this project at one image
size: that of the stored position embeddings, or --img-size. Programs that take other sizes resample the
positions in ways of their own, and differ.
"""

import argparse
from pathlib import Path

import torch

from dinov2 import cli
from dinov2.errors import ConfigError
from dinov2.hub.export_layout import Normalisation
from dinov2.hub.export_targets import TARGETS, check_output, export
from dinov2.models.companions import IMAGENET
from dinov2.models.integrity import sha256_of
from dinov2.models.pretrained import BackboneWeights, build_from_weights, open_weights

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MODEL_OPTIONS = ("num_heads", "interpolate_offset", "interpolate_antialias")


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m dinov2.hub.export", description=__doc__.partition("\n\n")[2]
    )
    add = parser.add_argument
    add("--checkpoint", required=True, help="weight file or folder, of any layout that training starts from")
    add("--to", required=True, choices=TARGETS, help="what to write")
    add("--output", required=True, help="file to write, or folder for timm and transformers")
    add("--entry", choices=("teacher", "student"), help="network of a checkpoint (default: teacher)")
    add("--img-size", type=int, help="pixels to lay positions out for (default: those of the stored grid)")
    add("--num-heads", type=int, help="attention heads, where neither width nor a config beside it tells")
    add("--dtype", choices=DTYPES, default="float32", help="precision to write (default: %(default)s)")
    add("--mean", type=float, nargs=3, help="of the normalisation (default: found beside the weights)")
    add("--std", type=float, nargs=3, help="likewise")
    add("--interpolate-offset", type=float, help="of positions for --img-size: 0, or the historic 0.1")
    add("--interpolate-antialias", action=argparse.BooleanOptionalAction, help="of positions for --img-size")
    add("--force", action="store_true", help="replace files that exist")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Read a backbone, write it for another program, and say how to load it."""
    args = get_args_parser().parse_args(arguments)
    check_output(args.to, Path(args.output))
    weights = open_weights(args.checkpoint, args.entry)
    _check_size(args.img_size, weights.architecture.patch_size)
    normalisation, origin = _normalisation(args, weights)
    options = {name: value for name in MODEL_OPTIONS if (value := getattr(args, name)) is not None}
    model = build_from_weights(weights, img_size=args.img_size, **options)
    model = model.to(DTYPES[args.dtype])
    files, notes = export(model, args.to, args.output, normalisation=normalisation, force=args.force)
    for file in files:
        cli.say(f"wrote {file} ({_size(file.stat().st_size)}, sha256 {sha256_of(file)})")
    size, mean, std = model.patch_embed.img_size[0], normalisation.mean, normalisation.std
    cli.say(f"for images of {size} x {size} pixels, normalised with mean {mean} and std {std} ({origin})")
    for note in notes:
        cli.say(f"note: {note}")
    heads = f", num_heads={args.num_heads}" if args.num_heads else ""
    cli.say(TARGETS[args.to].snippet.format(path=args.output, options=heads))


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count} bytes"


def _check_size(size: int | None, patch_size: int | None) -> None:
    """Raise unless patches of that size (None: no ViT, which building reports) fill an image evenly."""
    if size is None or patch_size is None:
        return
    if size < patch_size or size % patch_size:
        raise ConfigError(
            f"--img-size {size} does not divide into patches of {patch_size} pixels: use a multiple, such as "
            f"{max(1, round(size / patch_size)) * patch_size}."
        )


def _normalisation(args: argparse.Namespace, weights: BackboneWeights) -> tuple[Normalisation, str]:
    """Return the constants to export, and where they are from."""
    if (args.mean is None) != (args.std is None):
        raise ConfigError("--mean and --std belong together: give both or none.")
    if args.mean is not None:
        if not (all(0 <= value <= 1 for value in args.mean) and all(0 < value <= 1 for value in args.std)):
            raise ConfigError(
                f"--mean {args.mean} and --std {args.std} are no constants for channels of 0..1: the mean "
                "lies between 0 and 1, the standard deviation above 0 and up to 1."
            )
        return Normalisation(tuple(args.mean), tuple(args.std)), "as given"
    if weights.normalisation is None:
        return Normalisation(*IMAGENET), "ImageNet's, as nothing says otherwise"
    beside = weights.companion.normalisation is not None
    origin = ", ".join(weights.companion.origin) if beside else weights.looks_like
    return Normalisation(*weights.normalisation), f"those of {origin}"


if __name__ == "__main__":
    cli.run(main)
