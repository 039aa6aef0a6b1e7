"""Measures the index builder against ``os.walk`` with an ``os.stat`` per file, in alternation, on real files.

    python scripts/bench_build_index.py [--files 200000] [--workers 0 2 4] [--verify none]

It makes its trees of small JPEG tiles below a temporary folder (``--folder`` says where: take the file system
that matters) and prints, for each shape of tree, the median ratio of the two times; larger is better for us.
All is from a warm cache. Our time includes everything: listing, journal, lock, rows, names. A line gives the
processor time per file as well, which tells on a machine that others use.
"""

import argparse
import io
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dinov2 import cli  # noqa: E402 - the lines above make the package known where it is not installed
from dinov2.data.datasets.tile_index import IndexFiles  # noqa: E402
from dinov2.data.indexing.build import build_index  # noqa: E402
from dinov2.data.indexing.verify import LEVELS  # noqa: E402

TILE_PIXELS = 16
# Name of the shape -> tiles per slide.
SHAPES = {"like TCGA": 1000, "few tiles a slide": 20, "one slide": None}


class Timing(NamedTuple):
    """Seconds by the clock and of processors."""

    wall: float
    cpu: float


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument(
        "--files", type=int, default=200_000, help="tiles of each tree (default: %(default)s)"
    )
    parser.add_argument(
        "--workers", type=int, nargs="+", default=[0, 2, 4], help="numbers of processes to try"
    )
    parser.add_argument("--verify", choices=LEVELS, default="none", help="as for the builder")
    parser.add_argument("--repeats", type=int, default=5, help="timings of each (default: %(default)s)")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="trees to make")
    parser.add_argument("--folder", help="where to make them (default: the system's temporary folder)")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Measure the index builder against os.walk with an os.stat per file."""
    args = get_args_parser().parse_args(arguments)
    logging.getLogger("dinov2").setLevel(logging.ERROR)
    cli.say(f"{args.files:,} files, {os.cpu_count()} cores, verify {args.verify}, {args.repeats} repeats")
    cli.say(
        "| tree | workers | us/file, os.walk + stat | us/file, ours | ratio (least to most) | of CPU time |"
    )
    cli.say("| --- | --- | --- | --- | --- | --- |")
    for shape in args.shapes:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            tree = Path(folder, "patches")
            make_tree(tree, args.files, SHAPES[shape] or args.files)
            for workers, (theirs, ours) in measure(str(tree), folder, args).items():
                pairs = list(zip(theirs, ours, strict=True))
                ratios = sorted(plain.wall / built.wall for plain, built in pairs)
                of_cpu = statistics.median(plain.cpu / built.cpu for plain, built in pairs)
                times = [
                    f"{statistics.median(time.wall for time in one) / args.files * 1e6:.2f}"
                    for one in (theirs, ours)
                ]
                cli.say(
                    f"| {shape} | {workers} | {times[0]} | {times[1]} | {statistics.median(ratios):.1f} "
                    f"({ratios[0]:.1f} to {ratios[-1]:.1f}) | {of_cpu:.1f} |"
                )


def make_tree(tree: Path, files: int, tiles_per_slide: int) -> None:
    """Write small JPEG tiles in the layout of the forks, with gaps between their numbers."""
    rng = np.random.default_rng(0)
    buffer = io.BytesIO()
    pixels = rng.integers(0, 256, (TILE_PIXELS, TILE_PIXELS, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    for slide_number, first in enumerate(range(0, files, tiles_per_slide)):
        slide = f"TCGA-{slide_number:05d}-01Z-00-DX1.8b3a4f21"
        tree.joinpath(slide).mkdir(parents=True)
        count = min(tiles_per_slide, files - first)
        for number in np.sort(rng.choice(3 * count, count, replace=False)).tolist():
            tree.joinpath(slide, f"{slide}_patch_{number}.jpeg").write_bytes(buffer.getvalue())


def measure(tree: str, folder: str, args: argparse.Namespace) -> dict[int, tuple[list[Timing], list[Timing]]]:
    """Return (timings of the plain way, of ours) of every repeat, by number of workers."""
    os.sync()  # what was just written would otherwise be written out within a timing
    plain_walk(tree)
    timings: dict[int, tuple[list[Timing], list[Timing]]] = {workers: ([], []) for workers in args.workers}
    for _ in range(args.repeats):
        for workers, (theirs, ours) in timings.items():
            theirs.append(timing(plain_walk, tree))
            with tempfile.TemporaryDirectory(dir=folder) as extra:
                files = IndexFiles(extra, "TRAIN")
                ours.append(
                    timing(build_index, [tree], files, workers=workers, verify=args.verify, fresh=True)
                )
                assert len(np.load(files.entries, mmap_mode="r")) == args.files
    return timings


def plain_walk(tree: str) -> int:
    """Count the bytes of all files as a simple script would."""
    total = 0
    for parent, _, names in os.walk(tree):
        for name in names:
            total += os.stat(os.path.join(parent, name)).st_size  # noqa: PTH116, PTH118 - what is compared with
    return total


def timing(function: Callable[..., object], *args: object, **options: object) -> Timing:
    """Return how long a call takes."""
    wall, cpu = time.perf_counter(), cpu_seconds()
    function(*args, **options)
    return Timing(time.perf_counter() - wall, cpu_seconds() - cpu)


def cpu_seconds() -> float:
    """Return the processor time of this process and of its workers that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


if __name__ == "__main__":
    cli.run(main)
