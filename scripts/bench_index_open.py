"""How long until the first batch of a dataset of 128 million tiles, and how much memory does a worker take?

Writes an index of the layout of ``Pathology`` (one patches folder, 12,000 slides, 12 bytes per tile) and real
JPEG tiles for those that the first batches draw, then opens it in fresh processes just as the trainer does.

    python -m scripts.bench_index_open --folder /tmp/bench --tiles 128000000

Columns: seconds from opening the dataset until it is open and until the first batch, once with plain crops
(index, sampler, reading, decoding) and once with DINOv2's augmentation; CPU seconds of both processes, for a
machine that is busy; MiB of private memory (smaps_rollup: pages that no other process shares) of a loader
worker that has torch imported and nothing to do ("empty") and of the real one; resident growth of the main
process. Linux only.
"""

import argparse
import csv
import json
import multiprocessing
import os
import subprocess
import sys
import time
from itertools import islice, product
from pathlib import Path

import numpy as np

from dinov2 import cli
from dinov2.configs import resolve_config
from dinov2.errors import ConfigError

REPO = Path(__file__).resolve().parents[1]
PICTURE = REPO / "scripts" / "data" / "hgsc_nest.jpg"
TILE_PIXELS = 256
CHUNK_ROWS = 1 << 20
METHODS, KINDS = ("fork", "forkserver", "spawn"), ("plain", "augmented")
COLUMNS = ("opened", "seconds", "cpu", "empty", "worker", "main")


def write_index(folder: Path, tiles: int, slides: int) -> None:
    """Write ``entry.csv``, ``entries-TRAIN.npy``, the recorded slide names and the slide folders."""
    from dinov2.data.datasets.tile_index import (
        DEFAULT_SUFFIX,
        ENTRY_DTYPE,
        index_fingerprint,
        write_slide_names,
    )

    patches = folder / "patches"
    names = sorted(f"TCGA-{number:05d}-01Z-00-DX1" for number in range(slides))
    for name in names:
        (patches / name).mkdir(parents=True, exist_ok=True)
    with (folder / "entry.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["patches_path"], [patches]])
    path = folder / "entries-TRAIN.npy"
    if path.exists():
        return
    entries = np.lib.format.open_memmap(path, mode="w+", dtype=ENTRY_DTYPE, shape=(tiles,))
    per_slide = -(-tiles // slides)
    for begin in range(0, tiles, CHUNK_ROWS):
        numbers = np.arange(begin, min(begin + CHUNK_ROWS, tiles))
        rows = np.zeros(len(numbers), dtype=ENTRY_DTYPE)
        rows["dir_index"], rows["actual_index"] = np.divmod(numbers, per_slide)
        entries[begin : begin + CHUNK_ROWS] = rows
    entries.flush()
    suffixes = [[DEFAULT_SUFFIX] * len(names)]
    write_slide_names(str(folder / "slides-TRAIN.json"), index_fingerprint(entries), [names], suffixes)


def forget_pages(path: Path) -> None:
    """Drop a file from the page cache, so that opening it is cold."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def run_config(folder: Path, batch: int):
    """The config of a training run over the index."""
    return resolve_config(
        "",
        [
            f"train.dataset_path=Pathology:split=TRAIN:root={folder}:extra={folder}",
            f"train.batch_size_per_gpu={batch}",
            "train.num_workers=1",
            "student.patch_size=14",
            "crops.local_crops_size=98",
            "train.device=cpu",
        ],
    )


def write_first_tiles(folder: Path, batch: int) -> None:
    """Write the tiles that the first batches draw, those fetched ahead included."""
    from PIL import Image

    from dinov2.train.input import build_dataset, build_sampler

    cfg = run_config(folder, batch)
    dataset = build_dataset(cfg)
    with Image.open(PICTURE) as picture:
        tile = picture.convert("RGB").crop((300, 300, 300 + TILE_PIXELS, 300 + TILE_PIXELS))
    for _, index in islice(build_sampler(cfg, dataset, 0), 4 * batch):
        tile.save(dataset.get_image_path(index), "JPEG", quality=90)


def memory_mib(pid: int, kind: str = "Private_") -> float:
    """Memory that only this process uses, or another kind of /proc/<pid>/smaps_rollup."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(kind)) / 1024


class Nothing:
    """A dataset that costs nothing, for the empty worker."""

    def __len__(self) -> int:
        return 1 << 20

    def __getitem__(self, index: int) -> int:
        return index


def draw(loader) -> tuple[float, float]:
    """Draw a batch; return the worker's private memory and its CPU seconds until then."""
    batches = iter(loader)
    next(batches)
    (worker,) = multiprocessing.active_children()
    pid = worker.pid
    ticks = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]
    return memory_mib(pid), sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


def stacked(samples: list) -> np.ndarray:
    """Collate the plain crops."""
    return np.stack([image for image, _ in samples])


def crop(image) -> np.ndarray:
    """A plain crop, in place of the augmentation."""
    return np.asarray(image)[:224, :224]


def measure(folder: Path, method: str, kind: str, batch: int) -> None:
    """Print one measurement as JSON; runs in a process of its own."""
    import torch
    from torch.utils.data import DataLoader

    from dinov2.data import make_dataset
    from dinov2.data.workers import worker_options
    from dinov2.train import input as trainer

    torch.multiprocessing.set_start_method(method)
    torch.set_num_threads(1)
    cfg = run_config(folder, batch)
    options = worker_options(1, timeout=0, prefetch_factor=None, start_method=method)
    empty, _ = draw(DataLoader(Nothing(), batch_size=batch, **options))
    before, begin, cpu = memory_mib(os.getpid(), "Rss"), time.perf_counter(), time.process_time()
    if kind == "plain":
        dataset = make_dataset(
            dataset_str=cfg.train.dataset_path, transform=crop, target_transform=trainer.no_target
        )
        opened = time.perf_counter() - begin
        samples, sampler = trainer.ReproducibleSamples(dataset, 0, 0), trainer.build_sampler(cfg, dataset, 0)
        loader = DataLoader(samples, batch, sampler=sampler, num_workers=1, collate_fn=stacked)
    else:
        dataset = trainer.build_dataset(cfg)
        opened = time.perf_counter() - begin
        loader = trainer.build_data_loader(cfg, dataset, 0, torch.float16)
    memory, worker_cpu = draw(loader)
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu + worker_cpu
    main = memory_mib(os.getpid(), "Rss") - before
    values = (opened, seconds, cpu, empty, memory, main)
    cli.say(json.dumps(dict(zip(COLUMNS, values, strict=True))))


def measured(folder: Path, method: str, kind: str, batch: int) -> dict[str, float]:
    """Measure in a fresh process with the index out of the page cache."""
    forget_pages(folder / "entries-TRAIN.npy")
    command = [sys.executable, "-m", "scripts.bench_index_open", "--folder", str(folder)]
    command += ["--measure", method, kind, "--batch", str(batch)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPO)
    if done.returncode:
        raise ConfigError(f"the measurement with {method} failed: {done.stderr.strip()[-1000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Write the index, measure and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="where the index and the tiles go")
    parser.add_argument("--tiles", type=int, nargs="+", default=[128_000_000], help="sizes to compare")
    parser.add_argument("--slides", type=int, default=12_000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.folder, *args.measure, args.batch)
        return
    cli.say(" ".join(f"{name:>12}" for name in ("tiles", "start", "images", *COLUMNS)))
    for tiles in args.tiles:
        folder = args.folder / str(tiles)
        write_index(folder, tiles, args.slides)
        write_first_tiles(folder, args.batch)
        for method, kind in product(METHODS, KINDS):
            got = measured(folder, method, kind, args.batch)
            values = " ".join(f"{got[key]:>12.2f}" for key in COLUMNS)
            cli.say(f"{tiles:>12,} {method:>12} {kind:>12} {values}")


if __name__ == "__main__":
    cli.run(main)
