"""Measures an epoch of an aggregator over many bags on disk, and the memory it takes.

    python scripts/bench_bags.py [--bags 100 1000] [--tiles 10000] [--width 384] [--aggregators abmil mean]

It writes bags of random float16 features below a temporary folder (``--folder`` says where; a bag takes
tiles x width x 2 bytes) and prints a line for each aggregator and number of bags: seconds of an epoch of
training with the validation on as many bags, and the peak of resident memory of a process that does nothing
else. The peak does not grow with the number of bags. To spare the disk, ``--files`` sets how many files there
are: bags beyond it read the same files again.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dinov2 import cli  # noqa: E402 - the lines above make the package known where it is not installed
from dinov2.eval.slides.aggregators import RECIPES, recipe_of  # noqa: E402
from dinov2.eval.slides.cohort import Patient  # noqa: E402
from dinov2.eval.slides.fitting import BagReading, FitOptions, fit, patient_logits  # noqa: E402
from dinov2.utils.device import resolve_device  # noqa: E402


def write_bags(folder: Path, files: int, tiles: int, width: int) -> None:
    """Write the files, float16."""
    for number in range(files):
        generator = torch.Generator().manual_seed(number)
        torch.save(torch.randn(tiles, width, generator=generator).half(), folder / f"{number}.pt")


def measure(
    folder: Path, bags: int, aggregator: str, width: int, workers: int, device: str
) -> dict[str, float]:
    """Run an epoch in this process; return its seconds and the peak of memory in MiB."""
    files = sorted(folder.glob("*.pt"))
    patients = [Patient(f"{n}", ("no", "yes")[n % 2], (files[n % len(files)],)) for n in range(bags)]
    reading = BagReading(half=True, workers=workers)
    recipe, device = recipe_of(aggregator), resolve_device(device)
    model = recipe.build(width, 1).to(device)
    options = FitOptions(recipe.learning_rate, recipe.weight_decay, epochs=1, patience=1)
    start = time.perf_counter()
    fit(model, patients, patients[:2], ["no", "yes"], options, reading)
    trained = time.perf_counter()
    patient_logits(model, patients, ["no", "yes"], reading)
    found = {
        "train_seconds": trained - start,
        "score_seconds": time.perf_counter() - trained,
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    if device.type == "cuda":
        found["peak_cuda_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return found


def main(args: argparse.Namespace) -> None:
    """Write the bags and measure each case in a process of its own."""
    if args.measure:
        folder, bags, aggregator = args.measure
        found = measure(Path(folder), int(bags), aggregator, args.width, args.workers, args.device)
        cli.say(json.dumps(found))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        write_bags(Path(folder), min(args.files or max(args.bags), max(args.bags)), args.tiles, args.width)
        for aggregator in args.aggregators:
            for bags in args.bags:
                command = [sys.executable, __file__, "--measure", folder, str(bags), aggregator]
                command += ["--width", str(args.width), "--workers", str(args.workers)]
                command += ["--device", args.device]
                out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                cli.say(f"{aggregator}, {bags} bags of {args.tiles} x {args.width}: {out.strip()}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Epoch time and memory of aggregators over many bags")
    parser.add_argument("--bags", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--files", type=int, help="(default: as many as bags)")
    parser.add_argument("--tiles", type=int, default=10_000)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--aggregators", nargs="+", default=["abmil", "mean"], choices=list(RECIPES))
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--folder", help="Where the temporary folder goes")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    cli.run(main, parser.parse_args())
