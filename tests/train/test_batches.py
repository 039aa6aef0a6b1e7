"""Batches of the steps: in the loader's order, none too many, on a GPU ready before they are needed."""

import time

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2.data.device_crops import finish_batch
from dinov2.errors import DatasetError
from dinov2.train.batches import ON_DEVICE, StepBatches
from dinov2.train.input import build_augmentation, build_collate
from tests.train.planning.steps import SMALL, random_batch, resolve
from tests.train.waits import reported_waits

CPU, GPU = torch.device("cpu"), torch.device("cuda")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Loader:
    """Yields batches and counts them; fails where told."""

    def __init__(self, batches, fails_at=None):
        self.batches, self.fails_at, self.drawn = batches, fails_at, 0

    def __iter__(self):
        for number, batch in enumerate(self.batches):
            if number == self.fails_at:
                raise DatasetError("no more tiles")
            self.drawn += 1
            yield [batch]


def test_on_a_cpu_batches_come_as_the_loader_makes_them_and_none_too_many():
    loader = Loader([{"number": n} for n in range(5)])
    steps = StepBatches(loader, 3, CPU, torch.float32)
    taken = []
    for batches in steps:
        taken.append(batches[0]["number"])
        steps.prepare_next()
        assert loader.drawn == len(taken) and steps.waited() == 0.0
    assert taken == [0, 1, 2]


def pinned(batch):
    return {
        name: part.pin_memory() if isinstance(part, torch.Tensor) else part for name, part in batch.items()
    }


def device_batch(cfg, seed):
    """One of the ``device`` pipeline: 8-bit crops and what is to happen to their colours."""
    torch.manual_seed(seed)
    augment = build_augmentation(cfg)
    pixels = np.random.default_rng(seed).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    samples = [(augment(Image.fromarray(pixels)), ()) for _ in range(cfg.train.batch_size_per_gpu)]
    return pinned(build_collate(cfg)(samples))


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_the_next_are_there_before_they_are_needed():
    cfg = resolve(*SMALL, "crops.pipeline=device")
    batches = [device_batch(cfg, seed) for seed in range(4)]
    expected = [finish_batch(batch, GPU, torch.bfloat16) for batch in batches]
    loader = Loader(batches)
    steps = StepBatches(loader, 3, GPU, torch.bfloat16)
    next(steps)
    for number in (1, 2):
        assert reported_waits(steps.prepare_next) == []
        assert loader.drawn == number + 1
        (ready,) = next(steps)
        assert all(ready[name].device.type == "cuda" for name in ON_DEVICE if name in ready)
        for name in ("collated_global_crops", "collated_local_crops", "collated_masks"):
            assert torch.equal(ready[name].cpu(), expected[number][name].cpu())
    steps.prepare_next()
    assert loader.drawn == 3 and next(steps, None) is None


@pytest.mark.gpu
@needs_gpu
def test_a_loader_that_fails_does_so_in_the_step_that_needs_the_batch():
    cfg = resolve(*SMALL)
    steps = StepBatches(Loader([pinned(random_batch(cfg))] * 3, fails_at=1), 3, GPU, torch.float32)
    next(steps)
    steps.prepare_next()
    with pytest.raises(DatasetError, match="no more tiles"):
        next(steps)


@pytest.mark.gpu
@needs_gpu
def test_only_time_in_which_the_device_is_idle_counts_as_waiting():
    class Slow(Loader):
        def __iter__(self):
            for batch in super().__iter__():
                time.sleep(0.2)
                yield batch

    cfg = resolve(*SMALL)
    steps = StepBatches(Slow([pinned(random_batch(cfg))] * 3), 3, GPU, torch.float32)
    next(steps)
    steps.prepare_next()
    torch.cuda.synchronize()
    assert 0.1 < steps.waited() < 10.0
    assert steps.waited() == 0.0  # since last asked
    next(steps)
    torch.cuda._sleep(2_000_000_000)  # cycles, a second or so
    steps.prepare_next()
    torch.cuda.synchronize()
    assert steps.waited() < 0.1
