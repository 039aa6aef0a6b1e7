"""How fast one process reads images from loose files, tar shards and Parquet files, in order and at random.

    python scripts/bench_shards.py --output DIR [--images 4000] [--rounds 3] [--cold]

Cuts H&E tiles out of a picture of the repository, packs the same tiles in every layout and reads them in
turns, so that other load on the machine hits all alike. Figures are medians over the rounds; compare those of
one run alone. ``--cold`` drops the files from the page cache before every measurement.
"""

import argparse
import io
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dinov2 import cli
from dinov2.data import make_dataset
from dinov2.data.datasets import shard_writers

REPO = Path(__file__).resolve().parents[1]
PICTURE = REPO / "scripts" / "data" / "hgsc_nest.jpg"
TILE = 224  # pixels
QUALITY = 90
IMAGES_PER_SHARD = 1000
ROW_GROUPS = (1, 32, 100, 1000)
ORDERS = ("in order", "at random")


def tiles(count: int) -> Iterator[bytes]:
    """Yield different tiles of one picture as JPEG files."""
    generator = np.random.default_rng(0)
    with Image.open(PICTURE) as opened:
        picture = opened.convert("RGB")
    for _ in range(count):
        left, top = (int(generator.integers(side - TILE)) for side in picture.size)
        buffer = io.BytesIO()
        picture.crop((left, top, left + TILE, top + TILE)).save(buffer, "JPEG", quality=QUALITY)
        yield buffer.getvalue()


def prepare(folder: Path, count: int) -> dict[str, str]:
    """Write the tiles in every layout; return the dataset strings."""
    samples = [
        shard_writers.Sample(f"{number:06d}", "jpg", data, f"{number:06d}.jpg", None)
        for number, data in enumerate(tiles(count))
    ]
    strings = {"loose files": f"ImageFolder:root={folder}/loose:labels=none"}
    for first in range(0, count, IMAGES_PER_SHARD):
        part = samples[first : first + IMAGES_PER_SHARD]
        place = folder / "loose" / f"{first:06d}"
        place.mkdir(parents=True)
        for sample in part:
            (place / f"{sample.name}.jpg").write_bytes(sample.data)
        write(
            folder / "tar" / f"{first:06d}.tar",
            lambda file, part=part: shard_writers.write_tar(file, iter(part)),
        )
        for rows in ROW_GROUPS:
            write(
                folder / f"parquet-{rows}" / f"{first:06d}.parquet",
                lambda file, part=part, rows=rows: shard_writers.write_parquet(file, iter(part), None, rows),
            )
    strings["WebDataset"] = f"WebDataset:root={folder}/tar"
    strings |= {f"Parquet, {rows} rows": f"Parquet:root={folder}/parquet-{rows}" for rows in ROW_GROUPS}
    os.sync()
    return strings


def write(path: Path, content: Callable[[Any], None]) -> None:
    """Write a file by a function of the open file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        content(file)


def drop_from_page_cache(folder: Path) -> None:
    """Make the next reading of all files below a folder come from the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def rate(dataset: Any, indices: list[int], decode: bool) -> float:
    """Return images per second."""
    begin = time.perf_counter()
    for index in indices:
        dataset[index] if decode else dataset.get_image_data(index)
    return len(indices) / (time.perf_counter() - begin)


def measure(strings: dict[str, str], rounds: int, draws: int, cold: bool) -> dict:
    """Return the rates of every layout, order and kind of work, one per round."""
    rates: dict[tuple[str, str, bool], list[float]] = {}
    generator = np.random.default_rng(1)
    for _ in range(rounds):
        for decode in (False, True):
            for order in ORDERS:
                for name, text in strings.items():
                    dataset = make_dataset(dataset_str=text)  # with nothing of an earlier turn in its cache
                    count = min(draws, len(dataset))
                    indices = (
                        np.arange(count)
                        if order == ORDERS[0]
                        else generator.permutation(len(dataset))[:count]
                    )
                    if cold:
                        drop_from_page_cache(Path(dataset.root))
                    rates.setdefault((name, order, decode), []).append(
                        rate(dataset, indices.tolist(), decode)
                    )
    return rates


def report(strings: dict[str, str], rates: dict) -> None:
    """Say the medians, and each as a multiple of the loose files'."""
    columns = [(order, decode) for decode in (False, True) for order in ORDERS]
    names = [f"{'decode' if decode else 'read'} {order}" for order, decode in columns]
    cli.say(f"{'images/s':<20}{''.join(f'{name:>24}' for name in names)}")
    baseline = next(iter(strings))
    for name in strings:
        cells = []
        for order, decode in columns:
            median = statistics.median(rates[name, order, decode])
            ratio = median / statistics.median(rates[baseline, order, decode])
            cells.append(f"{median:>16.0f} ({ratio:4.2f}x)")
        cli.say(f"{name:<20}{''.join(f'{cell:>24}' for cell in cells)}")


def main(arguments: list[str] | None = None) -> None:
    """Measure reading and decoding from loose files and shards."""
    parser = argparse.ArgumentParser(prog="scripts/bench_shards.py", description=main.__doc__)
    parser.add_argument("--output", required=True, help="empty folder for the files")
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--draws", type=int, default=1000, help="images read per measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cold", action="store_true", help="read from the disk, not from the page cache")
    args = parser.parse_args(arguments)
    folder = Path(args.output)
    strings = prepare(folder, args.images)
    report(strings, measure(strings, args.rounds, args.draws, args.cold))


if __name__ == "__main__":
    cli.run(main)
