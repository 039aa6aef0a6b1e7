"""Numbers fetched in bulk against torch's own calls, one after the other."""

import random

import pytest
import torch

from dinov2.data.random_stream import WORDS, RandomStream

CALLS = {
    "unit": (lambda stream: stream.unit(), lambda: torch.rand(1).item()),
    "uniform": (
        lambda stream: stream.uniform(0.05, 0.32),
        lambda: torch.empty(1).uniform_(0.05, 0.32).item(),
    ),
    "negative": (
        lambda stream: stream.uniform(-0.1, 0.1),
        lambda: torch.empty(1).uniform_(-0.1, 0.1).item(),
    ),
    "below": (lambda stream: stream.below(289), lambda: torch.randint(0, 289, size=(1,)).item()),
    "one": (lambda stream: stream.below(1), lambda: torch.randint(0, 1, size=(1,)).item()),
    "permutation": (lambda stream: stream.permutation(4), lambda: torch.randperm(4).tolist()),
}


@pytest.mark.parametrize("seed", [0, 7, 2**62 + 1])
def test_equals_torch_call_by_call(seed):
    """In a random order, over several fetches."""
    names = random.Random(seed).choices(list(CALLS), k=3 * WORDS)
    torch.manual_seed(seed)
    stream = RandomStream()
    ours = [CALLS[name][0](stream) for name in names]
    torch.manual_seed(seed)
    assert ours == [CALLS[name][1]() for name in names]


def test_two_streams_go_on_where_the_generator_stands():
    torch.manual_seed(0)
    first, second = ([stream.unit() for _ in range(3)] for stream in (RandomStream(), RandomStream()))
    assert first != second
