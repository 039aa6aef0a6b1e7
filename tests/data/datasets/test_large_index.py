"""What a worker costs does not depend on how many tiles the index lists (see scripts/bench_index_open.py)."""

import multiprocessing
import pickle
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import DataLoader

from dinov2.data.datasets import Pathology
from dinov2.data.datasets.tile_index import ENTRY_DTYPE

SIZES = (100_000, 10_000_000)
BATCH = 64


def index_over_one_tile(folder, size, encoded):
    """A sparse index: its rows, zeros all, mean the first tile of the first slide."""
    slide = folder / "patches" / "slide"
    slide.mkdir(parents=True)
    (slide / "slide_patch_0.jpeg").write_bytes(encoded)
    (folder / "entry.csv").write_text(f"patches_path\n{folder / 'patches'}\n")
    path = folder / "entries-TRAIN.npy"
    np.lib.format.open_memmap(path, mode="w+", dtype=ENTRY_DTYPE, shape=(size,)).flush()
    dataset = Pathology(split="TRAIN", root=str(folder), extra=str(folder), transform=np.asarray)
    assert len(dataset) == size
    return dataset


@pytest.fixture
def datasets(tmp_path, encoded):
    return {size: index_over_one_tile(tmp_path / f"{size:09d}", size, encoded[0]) for size in SIZES}


def private_bytes(pid):
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def images_of(samples):
    return np.stack([image for image, _ in samples])


def loader(dataset):
    """The worker reads places spread over the whole index."""
    places = np.linspace(0, len(dataset) - 1, BATCH).astype(int).tolist()
    return DataLoader(
        dataset, BATCH, sampler=places, num_workers=1, collate_fn=images_of, persistent_workers=True,
        multiprocessing_context="fork",
    )  # fmt: skip


def test_what_a_worker_is_sent_does_not_grow(datasets):
    """A spawned worker gets the dataset as a pickle; the index in it is a path."""
    small, large = (pickle.dumps(dataset) for dataset in datasets.values())
    assert len(small) == len(large) < 4096
    assert pickle.loads(large).get_image_path(SIZES[1] - 1).endswith("slide_patch_0.jpeg")


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's smaps_rollup")
def test_the_memory_of_a_worker_does_not_grow(datasets):
    """The larger index has 120 MB; a list of it would have more."""
    used = {}
    for size, dataset in datasets.items():
        batches = iter(loader(dataset))
        assert next(batches).shape == (BATCH, 96, 96, 3)
        (worker,) = multiprocessing.active_children()
        used[size] = private_bytes(worker.pid)
    assert used[SIZES[1]] - used[SIZES[0]] < 8 * 2**20, used


def test_the_index_is_not_read_again_for_the_next_epoch(datasets):
    """Nor by a worker: the files may be gone once it has opened them."""
    dataset = datasets[SIZES[0]]
    batches = loader(dataset)
    assert len(list(batches)) == 1
    for name in ("entries-TRAIN.npy", "entry.csv"):
        Path(dataset.root, name).unlink()
    assert [batch.shape for batch in batches] == [(BATCH, 96, 96, 3)]
