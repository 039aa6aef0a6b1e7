"""Unreadable images: what stands in for them, who is told, and when it is enough."""

import csv
import itertools
import logging
import pickle
from functools import partial

import numpy as np
import pytest
import torch

from dinov2 import distributed
from dinov2.data import unreadable
from dinov2.data.loader_errors import WatchedLoader
from dinov2.data.unreadable import (
    MAX_ATTEMPTS,
    UNREADABLE,
    CollateDraws,
    Failure,
    UnreadableImages,
    allowed_failures,
    read_or_replace,
    replacement,
)
from dinov2.data.workers import worker_options
from dinov2.errors import ImageReadError, UnreadableImagesError, UnsuitableImageError
from dinov2.train.input import PositionSampler, ReproducibleDraws, ReproducibleSamples
from tests.distributed.launch import run_in_processes

COUNT = 40
BAD = frozenset(range(0, COUNT, 3))


class Tiles(torch.utils.data.Dataset):
    """Its items tell their index and a random number; some of them can not be read."""

    def __init__(self, bad=BAD, count=COUNT):
        self.bad, self.count = bad, count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index in self.bad:
            torch.rand(index + 1)  # what it draws before it fails must not matter
            raise ImageReadError(f"can not read {index}", path=f"/tiles/{index}\t.png", reason="cut\noff")
        return index, torch.rand(1).item()


class Buggy(Tiles):
    def __getitem__(self, index):
        raise TypeError("of the program")


def expected_draw(seed, rank, position, index, bad=BAD, count=COUNT):
    """The sample and the failures of a place, computed from the rule alone."""
    failures = []
    attempts = itertools.count(1)
    while index in bad:
        failures.append(index)
        index = replacement(seed, rank, position, next(attempts), count)
    return index, failures


def stack(samples):
    return {"indices": [index for index, _ in samples], "noise": [noise for _, noise in samples]}


def loader(num_workers, start=0, start_method="default", dataset=None, rank=0):
    order = [(7 * position + 1) % COUNT for position in range(120)]
    return WatchedLoader(
        ReproducibleDraws(dataset or Tiles(), 5, rank),
        sampler=PositionSampler(order[start:], start),
        batch_size=8,
        collate_fn=CollateDraws(stack),
        **worker_options(num_workers, timeout=300, prefetch_factor=2, start_method=start_method),
    )


def all_of(batches):
    indices, noise, failures = [], [], []
    for batch in batches:
        indices += batch["indices"]
        noise += batch["noise"]
        failures.append(batch.get(UNREADABLE, []))
    return indices, noise, failures


@pytest.fixture(scope="module")
def drawn():
    return all_of(loader(0))


def test_every_place_has_a_sample_and_every_failure_is_told(drawn):
    indices, _, failures = drawn
    expected = [expected_draw(5, 0, position, (7 * position + 1) % COUNT) for position in range(120)]
    assert indices == [index for index, _ in expected]
    assert not BAD & set(indices)
    paths = [[failure.path for failure in batch] for batch in failures]
    by_place = [[f"/tiles/{index}\t.png" for index in bad] for _, bad in expected]
    assert paths == [sum(by_place[first : first + 8], []) for first in range(0, 120, 8)]
    assert {failure.reason for batch in failures for failure in batch} == {"cut off"}
    assert max(len(bad) for _, bad in expected) > 1, "a replacement that is unreadable as well was not met"


@pytest.mark.parametrize(
    ("workers", "method"),
    [
        (2, "fork"),
        pytest.param(2, "spawn", marks=pytest.mark.slow),
        pytest.param(1, "forkserver", marks=pytest.mark.slow),
    ],
)
def test_workers_hand_on_the_same_samples_and_failures(drawn, workers, method):
    got = loader(workers, start_method=method)
    assert got.multiprocessing_context.get_start_method() == method
    assert all_of(got) == drawn


def test_a_run_that_begins_in_the_middle_sees_the_same(drawn):
    resumed = all_of(loader(0, start=48))
    assert resumed == (drawn[0][48:], drawn[1][48:], drawn[2][6:])


def test_processes_and_places_have_replacements_of_their_own():
    drawn = {
        (seed, rank, position, attempt): replacement(seed, rank, position, attempt, 10**9)
        for seed, rank, position, attempt in itertools.product(range(2), range(2), range(50), range(1, 4))
    }
    assert len(set(drawn.values())) == len(drawn)
    few = [replacement(0, 0, position, 1, 4) for position in range(4000)]
    assert min(few.count(index) for index in range(4)) > 900


def test_samples_alone_are_those_of_the_draws():
    samples, draws = ReproducibleSamples(Tiles(), 5, 0), ReproducibleDraws(Tiles(), 5, 0)
    assert samples[(2, 3)] == draws[(2, 3)].sample
    assert [failure.path for failure in draws[(2, 3)].failures][0] == "/tiles/3\t.png"
    assert draws[(2, 4)].failures == []


@pytest.mark.parametrize("workers", [0, 1])
def test_when_nothing_can_be_read_it_ends_with_a_list(workers):
    with pytest.raises(UnreadableImagesError) as caught:
        next(iter(loader(workers, dataset=Tiles(bad=frozenset(range(COUNT))))))
    text = str(caught.value)
    assert text.startswith(f"can not read image for sample 1, nor one of {MAX_ATTEMPTS} others")
    assert text.count("cut off") == 1 and "such as /tiles/1\t.png" in text
    assert "storage" in text and "dinov2.data.index" not in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ImageReadError("", path="/a", reason="no such file or directory"), "older than the tiles"),
        (UnsuitableImageError("", path="/a", reason="too small: use larger tiles"), "can not use image"),
    ],
)
def test_the_advice_fits_the_reason(error, expected):
    def read(index):
        raise error

    with pytest.raises(UnreadableImagesError, match=expected) as caught:
        read_or_replace(read, 0, lambda attempt: attempt)
    assert ("storage" in str(caught.value)) == (type(error) is ImageReadError)


def test_the_verdict_names_each_image_once(tmp_path):
    images = UnreadableImages(tmp_path, 0.001)
    with pytest.raises(UnreadableImagesError) as caught:
        images.update(0, [Failure("/a.png", "cut off")] * 11, samples=1, total=11)
    assert str(caught.value).count("/a.png") == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_of_the_program_are_not_swallowed(workers):
    with pytest.raises(TypeError, match="of the program"):
        next(iter(loader(workers, dataset=Buggy())))


def test_good_batches_have_no_further_entry_and_all_of_it_can_be_pickled():
    good = loader(0, dataset=Tiles(bad=frozenset()))
    assert all(set(batch) == {"indices", "noise"} for batch in good)
    failing = pickle.loads(pickle.dumps((good.dataset, good.collate_fn)))
    assert failing[0][(0, 1)].sample == good.dataset[(0, 1)].sample


def failing(path="/a.png", count=1):
    return [Failure(path, "cut off")] * count


@pytest.mark.parametrize(
    ("limit", "draws", "allowed"),
    [(0.001, 64, 10), (0.001, 4000, 10), (0.001, 10_000, 19), (0.001, 10**7, 10_300), (0.0, 10**9, 0)],
)
def test_how_many_may_fail(limit, draws, allowed):
    assert int(allowed_failures(limit, draws)) == allowed


@pytest.mark.parametrize(("share_of_limit", "stopped"), [(0.75, 0.01), (1.0, 0.1), (1.3, 1.0), (3.0, 1.0)])
def test_how_often_a_run_is_stopped(share_of_limit, stopped):
    """300 runs until their 3,000th bad image, of which draws between two have an exponential distribution."""
    rng = np.random.default_rng(0)
    draws = np.cumsum(rng.exponential(1 / (0.001 * share_of_limit), (300, 3000)), axis=1)
    allowed = np.vectorize(partial(allowed_failures, 0.001))(draws)
    share = (np.arange(1, 3001) > allowed).any(axis=1).mean()
    assert share <= stopped if stopped < 1 else share == 1


def run_until_stopped(folder, limit, every, iterations=400):
    """One failure in each ``every``-th iteration of 64 samples; return where the run stops, or None."""
    counts = UnreadableImages(folder, limit)
    for iteration in range(iterations):
        bad = int(iteration % every == 0)
        try:
            counts.update(iteration, failing(count=bad), samples=64, total=bad)
        except UnreadableImagesError:
            return iteration
    return None


@pytest.mark.parametrize(
    ("limit", "every", "stops_at"),
    [
        (0.001, 40, None),  # 1 of 2,560: below the limit
        (0.001, 4, 40),  # 1 of 256: stops with the 11th failure, not with the first
        (0.001, 1, 10),
        (0.0, 40, 0),
        (1.0, 1, None),
    ],
)
def test_where_a_run_stops(tmp_path, limit, every, stops_at):
    assert run_until_stopped(tmp_path, limit, every) == stops_at


def test_a_limit_of_1_never_stops(tmp_path):
    counts = UnreadableImages(tmp_path, 1.0)
    counts.update(0, failing(count=500), samples=1, total=500)
    assert (counts.failures, counts.draws) == (500, 501)


def test_the_sentence_that_stops_a_run(tmp_path):
    counts = UnreadableImages(tmp_path, 0.0)
    with pytest.raises(UnreadableImagesError) as caught:
        counts.update(3, failing("/x/y.png", 2), samples=62, total=2)
    text = str(caught.value)
    assert text.startswith(
        "2 of 64 images drawn since the start could not be read (3.12 %), and train.max_bad_fraction 0 "
        "allows 0 by now; the first are /x/y.png (cut off)"
    )
    assert str(tmp_path / "unreadable_images.tsv") in text


def rows(folder):
    with (folder / "unreadable_images.tsv").open(newline="", errors="surrogateescape") as file:
        return list(csv.reader(file, delimiter="\t"))


def test_the_file_lists_them_and_goes_on_after_a_resume(tmp_path):
    odd = 'a\tb "c"\n\udcff.png'
    for start in (0, 7):
        UnreadableImages(tmp_path, 1.0).update(start, failing(odd), samples=1, total=1)
    header, *listed = rows(tmp_path)
    assert header == ["path", "reason", "iteration", "rank"]
    assert listed == [[odd, "cut off", "0", "0"], [odd, "cut off", "7", "0"]]


def test_the_file_is_bounded(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(unreadable, "MAX_ROWS", 5)
    with caplog.at_level(logging.WARNING, logger="dinov2"):
        for _start in (0, 1):
            counts = UnreadableImages(tmp_path, 1.0)
            for iteration in range(3):
                counts.update(iteration, failing(count=2), samples=1, total=2)
            assert counts.failures == 6
    assert len(rows(tmp_path)) == 1 + 5
    assert caplog.text.count("is full with 5 rows") == 1


def test_nothing_is_written_while_nothing_is_bad(tmp_path, caplog):
    counts = UnreadableImages(tmp_path, 0.001)
    with caplog.at_level(logging.DEBUG, logger="dinov2"):
        counts.update(0, [], samples=64, total=0)
        counts.report()
    assert caplog.text == ""
    assert list(tmp_path.iterdir()) == []


def test_the_log_is_not_flooded(tmp_path, caplog):
    counts = UnreadableImages(tmp_path, 1.0)
    with caplog.at_level(logging.WARNING, logger="dinov2"):
        for iteration in range(100):
            counts.update(iteration, failing(f"/{iteration}.png", 3), samples=64, total=3)
        counts.report()
        counts.report()
    lines = [record.getMessage() for record in caplog.records]
    assert [line.count("replaces the unreadable") for line in lines] == [1] * 10 + [0, 0]
    assert lines[0] == "iteration 0: another sample replaces the unreadable /0.png (cut off)"
    assert lines[-1].startswith("300 of 6700 images drawn since the start could not be read (4.48 %)")


def count_in_two_processes(folder, limit):
    """Only rank 1 meets unreadable images, in odd iterations; return where it stops, and its sentence."""
    rank = distributed.get_global_rank()
    counts = UnreadableImages(folder, limit)
    for iteration in range(30):
        mine = failing(f"/{iteration}.png", rank * (iteration % 2))
        total = distributed.all_reduce_sum_(torch.tensor(len(mine))).item()
        try:
            counts.update(iteration, mine, samples=8, total=total)
        except UnreadableImagesError as error:
            return iteration, str(error)
    return None


@pytest.mark.slow  # a real run of two processes is in tests/train/test_unreadable_run.py
def test_all_processes_stop_together_and_one_writes(tmp_path):
    first, second = run_in_processes(count_in_two_processes, str(tmp_path), 0.01)
    assert first == second
    assert first[0] == 21  # the 11th odd iteration
    assert "/1.png (cut off)" in first[1]
    assert rows(tmp_path)[1:] == [[f"/{i}.png", "cut off", str(i), "1"] for i in range(1, 22, 2)]
