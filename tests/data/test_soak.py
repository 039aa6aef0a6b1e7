"""Many draws from tiles of which one in a hundred is damaged: nothing is lost, and nothing leaks."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2.data import make_dataset
from dinov2.data.loader_errors import WatchedLoader
from dinov2.data.unreadable import UNREADABLE, CollateDraws, UnreadableImages, replacement
from dinov2.data.workers import seed_worker, worker_options
from dinov2.train.input import PositionSampler, ReproducibleDraws, no_target
from tests.conftest import REAL_DATA

TILES, SIDE, BATCH, SEED = 1000, 64, 50, 3
GROWTH_MIB = 16  # of private memory of each process between a fifth of the draws and the last


def top_left(image):
    """A light stand-in for the augmentation."""
    return torch.from_numpy(np.array(image.resize((8, 8))))


def collate(samples):
    return {"tiles": torch.stack([tile for tile, _ in samples])}


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    """A dataset of JPEG tiles; ten of the thousand are cut, empty, no image, zeros at the end, or missing."""
    folder = tmp_path_factory.mktemp("soak")
    (folder / "class").mkdir()
    paths = [folder / "class" / f"{number:04d}.jpg" for number in range(TILES)]
    with Image.open(REAL_DATA / "hgsc_nest.jpg") as picture:
        for number, path in enumerate(paths):
            column, row = number % (picture.width // SIDE), number // (picture.width // SIDE)
            left, top = SIDE * column, SIDE * row % (picture.height - SIDE)
            picture.crop((left, top, left + SIDE, top + SIDE)).save(path, quality=85)
    dataset = make_dataset(
        dataset_str=f"ImageFolder:root={folder}", transform=top_left, target_transform=no_target
    )
    damaged = np.random.default_rng(0).choice(TILES, TILES // 100, replace=False).tolist()
    for kind, index in enumerate(damaged):
        path = Path(dataset.get_image_path(index))
        whole = path.read_bytes()
        if kind % 5 == 4:
            path.unlink()
        else:
            half = whole[: len(whole) // 2]
            path.write_bytes([half, b"", b"not an image", half + b"\xff\xd9"][kind % 5])
    return dataset, frozenset(damaged)


def order(draws):
    passes = -(-draws // TILES)
    rng = np.random.default_rng(1)
    return np.concatenate([rng.permutation(TILES) for _ in range(passes)])[:draws].tolist()


def expected_failures(indices, damaged):
    """Paths do not matter here, only which index fails at which place: the rule, written down once more."""
    failures = []
    for position, index in enumerate(indices):
        attempt = 0
        while index in damaged:
            failures.append(index)
            attempt += 1
            index = replacement(SEED, 0, position, attempt, TILES)
    return failures


def private_mib(pid):
    """Memory that would come free if the process ended."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    sizes = [line.split() for line in text.splitlines() if line.startswith("Private_")]
    return sum(int(size) for _, size, _ in sizes) / 1024


def handles(pid):
    return len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208


def measure(pids):
    return [(private_mib(pid), handles(pid)) for pid in pids]


@pytest.mark.parametrize("draws", [2_000, pytest.param(50_000, marks=pytest.mark.slow)])
def test_nothing_is_lost_and_nothing_leaks(tiles, tmp_path, draws):
    dataset, damaged = tiles
    indices = order(draws)
    loader = WatchedLoader(
        ReproducibleDraws(dataset, SEED, 0),
        sampler=PositionSampler(indices, 0),
        batch_size=BATCH,
        collate_fn=CollateDraws(collate),
        worker_init_fn=seed_worker,
        **worker_options(2, timeout=120, prefetch_factor=2, start_method="default"),
    )
    counts = UnreadableImages(tmp_path, 1.0)
    batches = iter(loader)
    pids = [os.getpid(), *(process.pid for process in batches._workers._processes)]
    samples, paths, measured = 0, [], []
    for iteration, batch in enumerate(batches):
        failures = batch.pop(UNREADABLE, [])
        counts.update(iteration, failures, samples=BATCH, total=len(failures))
        paths += [failure.path for failure in failures]
        samples += len(batch["tiles"])
        assert (batch["tiles"].flatten(1).float().std(dim=1) > 0).all()
        if samples in (draws // 5, draws - BATCH * 4):  # the workers still have something to do
            measured.append(measure(pids))
    assert samples == draws

    expected = [dataset.get_image_path(index) for index in expected_failures(indices, damaged)]
    assert paths == expected
    assert counts.failures == len(expected)
    assert counts.draws == draws + len(expected)
    assert 0.007 < len(expected) / draws < 0.013
    assert len((tmp_path / "unreadable_images.tsv").read_text().splitlines()) == 1 + len(expected)
    print("private MiB and open files of each process", *measured, sep="\n")
    for (memory, files), (memory_then, files_then) in zip(*reversed(measured), strict=True):
        assert memory - memory_then < GROWTH_MIB
        assert files - files_then <= 8  # batches on their way are open files
