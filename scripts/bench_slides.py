"""Times tiles read from slides against the same tiles read from JPEG files, in one interleaved run.

Usage: python scripts/bench_slides.py [--slide FILE.svs] [--size 224] [--rounds 5]

Every case reads the same tiles. ``rows`` is row by row, ``random`` in random order, both with the tiles of
the file that were decoded kept at hand; ``scattered`` keeps none, as when draws are spread over more slides
than a process can keep. ``library`` leaves all reading to OpenSlide or tiffslide. Times are CPU times of the
process, which neighbours on the machine change little; files come from the page cache.
"""

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dinov2 import cli
from dinov2.data.datasets.decoders import ImageDataDecoder
from dinov2.data.slides import Slide, jpeg_tiles, open_slide, tile_grid
from dinov2.data.slides.backends import BACKENDS
from dinov2.errors import ConfigError

SVS = Path(__file__).resolve().parent / "data" / "cmu_small_region.svs"
ORDERS = ("rows", "random", "scattered")
JPEG_QUALITY = 75
Reader = Callable[[int], object]


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slide", type=Path, default=SVS, help="slide to read (default: the shipped SVS)")
    parser.add_argument("--size", type=int, default=224, help="side of the tiles in pixels")
    parser.add_argument("--gap", type=int, default=0, help="pixels left out between tiles")
    parser.add_argument("--rounds", type=int, default=5, help="how often each case is timed")
    parser.add_argument("--tiles", type=int, default=120, help="most tiles to read per case and round")
    return parser.parse_args()


def write_pyramid(slide: Slide, path: Path) -> Path:
    """Write the slide as a pyramid of three levels in JPEG tiles of 256 px."""
    try:
        import tifffile
    except ImportError as error:
        raise ConfigError("the benchmark writes a pyramid with tifffile: pip install tifffile") from error
    with tifffile.TiffWriter(path) as file:
        for times in (1, 2, 4):
            picture = np.asarray(slide.thumbnail(slide.mpp * times))
            file.write(
                picture,
                tile=(256, 256),
                compression="jpeg",
                compressionargs={"level": JPEG_QUALITY},
                photometric="rgb",
                subfiletype=int(times > 1),
                resolution=(1e4 / slide.mpp / times,) * 2,
                resolutionunit="CENTIMETER",
                metadata=None,
            )
    return path


def slide_reader(
    path: Path, backend: str, corners: np.ndarray, size: int, mpp: float, *, direct: bool, keep: bool
) -> Reader:
    """Return what reads tile number n of a slide."""
    slide = open_slide(str(path), backend=backend)
    slide.read(0, 0, size, mpp)
    if not direct:
        slide.close()
        slide._handle = BACKENDS[backend](str(path))
        if backend == "openslide" and not keep:
            import openslide

            slide._handle._handle.set_cache(openslide.OpenSlideCache(0))
    places = corners.tolist()
    return lambda number: slide.read(*places[number], size, mpp)


def file_reader(folder: Path, slide: Slide, corners: np.ndarray, size: int, mpp: float) -> Reader:
    """Write the tiles as JPEG files; return what reads and decodes tile number n."""
    files = [folder / f"{number}.jpeg" for number in range(len(corners))]
    for file, (x, y) in zip(files, corners.tolist(), strict=True):
        slide.read(x, y, size, mpp).save(file, quality=JPEG_QUALITY)
    return lambda number: ImageDataDecoder(files[number].read_bytes()).decode()


def seconds_per_tile(read: Reader, count: int, order: str, seed: int) -> float:
    """Read every tile once and return the mean CPU seconds, with no tile at hand at the start."""
    numbers = list(range(count))
    if order != "rows":
        random.Random(seed).shuffle(numbers)
    jpeg_tiles.forget_tiles()
    start = time.process_time()
    for number in numbers:
        if order == "scattered":
            jpeg_tiles.forget_tiles()
        read(number)
    return (time.process_time() - start) / count


def bench(path: Path, factor: float, options: argparse.Namespace) -> None:
    """Print the table of one slide at one resolution."""
    with open_slide(str(path)) as slide, tempfile.TemporaryDirectory() as folder:
        mpp = slide.mpp * factor
        corners = tile_grid(slide, size=options.size, mpp=mpp, overlap=-options.gap)
        corners = corners[: options.tiles]
        files = file_reader(Path(folder), slide, corners, options.size, mpp)
        cli.say(
            f"\n{path.name}, {len(corners)} tiles of {options.size} px at {factor:g} x level 0's mpp, gap "
            f"{options.gap}\n{'case':32}{'ms/tile':>10}{'x JPEG file':>14}"
        )
        for order in ORDERS:
            readers = {"JPEG files": files}
            for backend in BACKENDS:
                for direct in (True, False):
                    name = f"{backend}{'' if direct else ', library'}"
                    readers[name] = slide_reader(
                        path,
                        backend,
                        corners,
                        options.size,
                        mpp,
                        direct=direct,
                        keep=order != "scattered",
                    )
            compare(readers, len(corners), order, options.rounds)


def compare(readers: dict[str, Reader], count: int, order: str, rounds: int) -> None:
    """Time all readers in turns and print a line for each; the first is what the others are compared with."""
    times: dict[str, list[float]] = {name: [] for name in readers}
    for seed in range(rounds):
        for name, read in readers.items():
            times[name].append(seconds_per_tile(read, count, order, seed))
    first = next(iter(times.values()))
    for name, taken in times.items():
        ratio = statistics.median(mine / other for mine, other in zip(taken, first, strict=True))
        cli.say(f"{f'{name}, {order}':32}{statistics.median(taken) * 1e3:10.3f}{ratio:14.2f}")


def main() -> None:
    """Time the slide itself and a pyramid made from it."""
    options = parse_arguments()
    bench(options.slide, 1, options)
    with tempfile.TemporaryDirectory() as folder:
        with open_slide(str(options.slide)) as slide:
            pyramid = write_pyramid(slide, Path(folder, "pyramid.tiff"))
        bench(pyramid, 1, options)
        bench(pyramid, 2, options)


if __name__ == "__main__":
    cli.run(main)
