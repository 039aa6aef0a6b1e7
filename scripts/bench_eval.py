"""How long an exact nearest-neighbour search takes here, in scikit-learn and in faiss, at NCT-CRC's size.

    python scripts/bench_eval.py [--stored 100000] [--queries 7180] [--width 384] [--k 200] [--rounds 3]
        [--against FOLDER] [--output FILE]

Every search runs in a process of its own, which reports its time and its peak memory above that of the
features, in turn for several rounds. faiss is left out where it is not installed (pip install faiss-cpu).
``--against`` times the k-NN evaluation of another checkout, this project's or DINOv2's own, in turn with ours
instead: the public ``KnnModule`` on the same features, batch by batch. Prints a table; ``--output`` writes
JSON.
"""

import argparse
import importlib.util
import multiprocessing
import resource
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from dinov2 import cli  # noqa: E402 - the line above makes the packages known to a script
from dinov2.errors import ConfigError  # noqa: E402
from scripts.speed.checkouts import Checkout, SideError, check_tree  # noqa: E402
from scripts.speed.report_file import check_report, write_report  # noqa: E402

VOTING = REPO / "scripts" / "speed" / "voting.py"
CLASSES = 9
SPREAD = 0.6
SAMPLE_SECONDS = 0.005


def features(rows: int, width: int, seed: int) -> np.ndarray:
    """Return unit vectors in clusters round nine centres, float32."""
    centers = np.random.default_rng(99).standard_normal((CLASSES, width), dtype=np.float32)
    generator = np.random.default_rng(seed)
    made = generator.standard_normal((rows, width), dtype=np.float32)
    made *= SPREAD
    made += centers[generator.integers(0, CLASSES, rows)]
    made /= np.linalg.norm(made, axis=1, keepdims=True)
    return made


def search_here(stored: np.ndarray, queries: np.ndarray, k: int) -> np.ndarray:
    """Search as the k-NN evaluation does."""
    import torch

    from dinov2.eval.neighbor_search import find_neighbors

    return find_neighbors(torch.from_numpy(stored), torch.from_numpy(queries), k)[1].numpy()


def search_faiss(stored: np.ndarray, queries: np.ndarray, k: int) -> np.ndarray:
    """Search in faiss's exact index."""
    import faiss

    index = faiss.IndexFlatIP(stored.shape[1])
    index.add(stored)
    return index.search(queries, k)[1]


def search_sklearn(stored: np.ndarray, queries: np.ndarray, k: int) -> np.ndarray:
    """Search by scikit-learn's brute force."""
    from sklearn.neighbors import NearestNeighbors

    finder = NearestNeighbors(n_neighbors=k, algorithm="brute", metric="euclidean").fit(stored)
    return finder.kneighbors(queries, return_distance=False)


SEARCHES: dict[str, Callable[[np.ndarray, np.ndarray, int], np.ndarray]] = {
    "here": search_here,
    "faiss": search_faiss,
    "scikit-learn": search_sklearn,
}


def resident_mib() -> float:
    """Return the memory that this process has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def measure(name: str, options: argparse.Namespace, connection) -> None:
    """Run one search and send its time, its peak memory and its neighbours."""
    stored, queries = (
        features(rows, options.width, seed) for seed, rows in enumerate((options.stored, options.queries))
    )
    search = SEARCHES[name]
    search(stored[:1000], queries[:10], min(options.k, 1000))  # imports and threads
    before, peak, done = resident_mib(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, resident_mib())
            time.sleep(SAMPLE_SECONDS)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start, start_cpu = time.perf_counter(), time.process_time()
    rows = search(stored, queries, options.k)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
    done.set()
    watcher.join()
    connection.send((seconds, cpu_seconds, peak - before, rows[:: max(1, options.queries // 200)]))


def race(options: argparse.Namespace) -> dict[str, list[tuple]]:
    """Run all searches in turn; return what :func:`measure` sends, by the name of the search.

    Raises:
        SideError: a search ended without a result.
    """
    names = [name for name in SEARCHES if name != "faiss" or importlib.util.find_spec("faiss")]
    context = multiprocessing.get_context("spawn")
    runs: dict[str, list[tuple]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name in names:
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=measure, args=(name, options, sender))
            process.start()
            sender.close()  # so that a process that ends without an answer is no endless wait
            try:
                runs[name].append(receiver.recv())
            except EOFError:
                process.join()
                raise SideError(
                    f"the search of {name} ended without a result (exit code {process.exitcode}): see its "
                    "messages above, and use fewer --stored or a smaller --width if it lacked memory"
                ) from None
            process.join()
    return runs


def race_checkouts(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Let the k-NN module of this checkout and of another vote in turn."""
    check_tree(options.against, "dinov2/eval")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        files = {name: str(Path(folder, f"{name}.npy")) for name in ("stored", "queries")}
        for seed, name in enumerate(files):
            np.save(files[name], features(getattr(options, name), options.width, seed))
        settings = {**files, "k": options.k}
        sides = {
            name: stack.enter_context(Checkout(tree, VOTING, settings, options.threads))
            for name, tree in {"here": REPO, "the other checkout": options.against}.items()
        }
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
        for turn in range(options.rounds + 1):
            for name, side in sides.items():
                found = side.ask("run")
                if turn:  # the first round warms up
                    runs[name].append(found)
    return runs


def summary(clocks: dict[str, list[tuple[float, float]]], agree: dict[str, float]) -> dict[str, Any]:
    """Return seconds, CPU seconds and the median ratio of CPU seconds to ours, by name."""
    return {
        name: {
            "seconds": [round(wall, 2) for wall, _ in runs],
            "cpu_seconds": [round(cpu, 2) for _, cpu in runs],
            "median_cpu_time_over_here": round(
                statistics.median(run[1] / own[1] for run, own in zip(runs, clocks["here"], strict=True)), 2
            ),
            "agrees_with_here": round(agree[name], 6),
        }
        for name, runs in clocks.items()
    }


def table(report: dict[str, dict[str, Any]]) -> list[str]:
    """Return the lines of a Markdown table."""
    columns = list(next(iter(report.values())))
    lines = [f"| | {' | '.join(columns).replace('_', ' ')} |", f"|---|{'---|' * len(columns)}"]
    for name, row in report.items():
        cells = [", ".join(map(str, cell)) if isinstance(cell, list) else str(cell) for cell in row.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def get_args_parser() -> argparse.ArgumentParser:
    """Return the command-line parser."""
    parser = argparse.ArgumentParser(
        "bench_eval", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for flag, default in (("stored", 100_000), ("queries", 7_180), ("width", 384), ("k", 200), ("rounds", 3)):
        parser.add_argument(f"--{flag}", type=int, default=default)
    parser.add_argument("--threads", type=int, default=0, help="with --against (default: PyTorch's choice)")
    parser.add_argument("--against", type=Path, help="folder of another checkout, in which dinov2 lies")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    return parser


def main(options: argparse.Namespace) -> None:
    """Measure, print the table and write the JSON document."""
    for flag, least in (("stored", 1), ("queries", 1), ("width", 1), ("k", 1), ("rounds", 1), ("threads", 0)):
        if getattr(options, flag) < least:
            raise ConfigError(f"--{flag} is {getattr(options, flag)}; use {least} or more")
    if options.k > options.stored:
        raise ConfigError(f"--k is {options.k}; use at most --stored, which is {options.stored}")
    check_report(options.output)
    if options.against is not None:
        runs = race_checkouts(options)
        clocks = {name: [(run["wall"], run["cpu"]) for run in of] for name, of in runs.items()}
        predictions = {name: np.array(of[0]["predictions"]) for name, of in runs.items()}
        agree = {name: float((own == predictions["here"]).mean()) for name, own in predictions.items()}
        report = summary(clocks, agree)
    else:
        found = race(options)
        clocks = {name: [run[:2] for run in of] for name, of in found.items()}
        agree = {name: float((of[0][3] == found["here"][0][3]).mean()) for name, of in found.items()}
        report = summary(clocks, agree)
        for name, of in found.items():
            report[name]["peak_mib_above_features"] = round(max(run[2] for run in of))
    cli.say("\n".join(table(report)))
    write_report(options.output, {"options": vars(options), **report})


if __name__ == "__main__":
    cli.run(main, get_args_parser().parse_args())
