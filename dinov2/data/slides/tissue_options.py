"""The options of the command lines that look for tissue, and the settings they stand for."""

import argparse

from dinov2.data.slides.tissue import SegmentationSettings


def add_tissue_options(parser: argparse.ArgumentParser) -> None:
    """Add the options, whose defaults are those of :class:`SegmentationSettings`."""
    tissue = SegmentationSettings()
    add = parser.add_argument_group("tissue, where the list names no mask").add_argument
    add("--tissue-mpp", type=float, default=tissue.mpp, help="um per pixel to look at (default: %(default)s)")
    add(
        "--min-area",
        type=float,
        default=tissue.min_area_um2,
        help="smallest part, um2 (default: %(default)g)",
    )
    add(
        "--max-hole",
        type=float,
        default=tissue.max_hole_um2,
        help="holes to fill, um2 (default: %(default)g)",
    )
    add("--keep-pen", action="store_true", help="do not look for marker ink: for blue and green stains")


def tissue_settings_of(args: argparse.Namespace) -> SegmentationSettings:
    """Return the settings that a command line asks for."""
    return SegmentationSettings(
        mpp=args.tissue_mpp, min_area_um2=args.min_area, max_hole_um2=args.max_hole, pen=not args.keep_pen
    )
