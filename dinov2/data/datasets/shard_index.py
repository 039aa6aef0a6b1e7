"""An index over files that are read in place: built once, kept on disk, valid while they stay the same."""

import hashlib
import json
import logging
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from dinov2.data.datasets.arrays import IndexArray, atomic_file, remove_leftovers, save_array
from dinov2.data.datasets.class_numbers import class_numbers
from dinov2.data.datasets.folders import files_matching, without_repeats
from dinov2.data.locks import one_at_a_time
from dinov2.errors import DatasetError

logger = logging.getLogger("dinov2")

MOST_WORKERS = 16
PROGRESS_SECONDS = 30.0


def list_shards(root: str, pattern: str, *, dataset: str, example: str = "*.tar") -> list[Path]:
    """Return the files of a folder that match a pattern in the order of their paths; or the file itself.

    Raises:
        DatasetError: there is no such folder, nothing in it matches, or the pattern is none; the sentence
            shows ``example`` then.
    """
    place = Path(root)
    if root and place.is_file():
        return [place]
    if not root or not place.is_dir():
        raise DatasetError(
            f'the root of {dataset} is "{root}", which does not exist: give a folder or a file'
        )
    found = [Path(path) for path in without_repeats(root, files_matching(root, pattern, example=example))]
    if not found:
        hint = ' ("{...}" is no pattern here, write * instead)' if "{" in pattern else ""
        raise DatasetError(
            f'{dataset} finds no file "{pattern}" in "{root}"{hint}: give the right root, or another pattern='
        )
    return found


class ShardIndex:
    """Named arrays and a few facts over shards, in files whose names change when a shard does.

    The name is made from the options and from the name, size and time of change of every shard. Processes
    that build the same index at the same time write the same content under the same name.

    Args:
        folder: where the index lies or will lie; empty means beside the shards.
        kind: first part of the file names.
        root: folder of the shards.
        shards: the shards in order.
        options: what else the content depends on.
    """

    def __init__(
        self, folder: str, *, kind: str, root: str, shards: list[Path], options: dict[str, str]
    ) -> None:
        self._folder = Path(folder or (root if Path(root).is_dir() else Path(root).parent))
        self._root = str(Path(root).resolve())
        self._same_options = f"{kind}-{_digest([self._root, options])[:8]}-"
        facts = [(path.stat(), os.path.relpath(path, root)) for path in shards]
        state = [[name, stat.st_size, stat.st_mtime_ns] for stat, name in facts]
        self._stem = self._same_options + _digest(state)[:16]

    def load_or_build(
        self, build: Callable[[], tuple[dict[str, np.ndarray], dict[str, Any]]]
    ) -> tuple[dict[str, IndexArray], dict[str, Any]]:
        """Return the arrays and facts, from ``build()`` where they are not on disk.

        Raises:
            OutputError: the index is not there and can not be written.
        """
        facts = self._read_facts()
        if facts is None:
            what = f'the index of the shards in "{self._root}"'
            with one_at_a_time(self._path(".lock"), what=what) as alone:
                if alone:
                    remove_leftovers(str(self._path("")))
                facts = self._read_facts()
                if facts is None:
                    facts = self._write(*build())
        advice = f'delete "{self._folder / self._stem}*", and it is built again'
        arrays = {name: IndexArray(str(self._path(f".{name}.npy")), advice) for name in facts["arrays"]}
        return arrays, facts["facts"]

    def _path(self, ending: str) -> Path:
        return self._folder / f"{self._stem}{ending}"

    def _read_facts(self) -> dict[str, Any] | None:
        """Return what is written last of all, None before."""
        try:
            return json.loads(self._path(".json").read_text("utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def _write(self, arrays: dict[str, np.ndarray], facts: dict[str, Any]) -> dict[str, Any]:
        for name, array in arrays.items():
            save_array(str(self._path(f".{name}.npy")), array)
        content = {"root": self._root, "arrays": list(arrays), "facts": facts}
        with atomic_file(str(self._path(".json"))) as file:
            file.write(json.dumps(content).encode("utf-8"))
        self._remove_outdated()
        return content

    def _remove_outdated(self) -> None:
        """Delete the index of the same shards with the same options as they were before."""
        for path in self._folder.glob(f"{self._same_options}*"):
            if not path.name.startswith(self._stem):
                path.unlink(missing_ok=True)


def for_each_shard(
    function: Callable[[Path], Any], shards: list[Path], *, threads: bool = False
) -> list[Any]:
    """Return ``function(shard)`` of every shard in order, worked out in parallel, with progress in the log.

    Args:
        function: of one shard; in a module, so that other processes find it.
        shards: the shards.
        threads: work in threads, for a function that waits or calculates outside Python.
    """
    workers = min(len(shards), MOST_WORKERS)
    if workers < 2:
        return [function(shard) for shard in shards]
    results, began, told = [], time.monotonic(), time.monotonic()
    with _pool(workers, threads) as pool:
        for result in pool.map(function, shards):
            results.append(result)
            if time.monotonic() - told > PROGRESS_SECONDS:
                told = time.monotonic()
                logger.info("%d of %d shards indexed in %.0f s", len(results), len(shards), told - began)
    return results


def _pool(workers: int, threads: bool) -> Executor:
    if threads or multiprocessing.current_process().daemon:
        return ThreadPoolExecutor(workers)
    # Forked children start at once and do nothing here but read files.
    method = "fork" if sys.platform == "linux" else "spawn"
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context(method))


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True).encode("utf-8", "surrogateescape")
    return hashlib.sha256(text).hexdigest()


class Labels:
    """Labels as stored, turned into class numbers.

    Args:
        by_shard: for every shard, its different labels as text and for every sample the place in them.
    """

    def __init__(self, by_shard: list[tuple[list[str], np.ndarray]]) -> None:
        number, self.classes = class_numbers(name for names, _ in by_shard for name in names)
        self.numbers = np.concatenate(
            [np.array([number[name] for name in names], dtype=np.int64)[places] for names, places in by_shard]
        )
