"""How long an exact nearest-neighbour search takes here, in scikit-learn and in faiss, at NCT-CRC's size.

    python scripts/bench_eval.py [--stored 100000] [--queries 7180] [--width 384] [--k 200] [--rounds 3]

Every search runs in a process of its own, which reports its time and its peak memory above that of the
features, in turn for several rounds. faiss is left out where it is not installed (pip install faiss-cpu).
"""

import argparse
import importlib.util
import json
import multiprocessing
import resource
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

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


def main() -> None:
    """Measure and print one JSON document."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for flag, default in (("stored", 100_000), ("queries", 7_180), ("width", 384), ("k", 200), ("rounds", 3)):
        parser.add_argument(f"--{flag}", type=int, default=default)
    options = parser.parse_args()
    names = [name for name in SEARCHES if name != "faiss" or importlib.util.find_spec("faiss")]
    context = multiprocessing.get_context("spawn")
    runs: dict[str, list[tuple]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name in names:
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=measure, args=(name, options, sender))
            process.start()
            runs[name].append(receiver.recv())
            process.join()
    report = {"options": vars(options)}
    for name, found in runs.items():
        report[name] = {
            "seconds": [round(run[0], 2) for run in found],
            "cpu_seconds": [round(run[1], 2) for run in found],
            "peak_mib_above_features": round(max(run[2] for run in found)),
            "median_time_over_here": round(
                statistics.median(run[1] / own[1] for run, own in zip(found, runs["here"], strict=True)), 2
            ),
            "same_neighbours": round(float((found[0][3] == runs["here"][0][3]).mean()), 6),
        }
    sys.stdout.write(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
