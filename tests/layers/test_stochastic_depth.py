"""Subsets of packed batches: what is drawn, and the way of the tokens there and back."""

import pytest
import torch

from dinov2.layers.packing import PackedLayout
from dinov2.layers.stochastic_depth import draw_subsets, kept_sequences

LAYOUT = PackedLayout(((7, 3), (5, 2)))
RATES = (0.3, 0.3, 0.55, 0.9)
TOKENS, WIDTH = 31, 4
CPU = torch.device("cpu")


def sequences(subset):
    """Return the kept sequences of each batch, by the first of their tokens."""
    starts, found = [0, 21], []
    for rows, start, (_, n) in zip(
        subset.rows.split(subset.layout.sizes), starts, LAYOUT.shapes, strict=True
    ):
        tokens = (rows - start).view(-1, n)
        assert torch.equal(tokens, tokens[:, :1] + torch.arange(n)) and not (tokens[:, 0] % n).any()
        found.append((tokens[:, 0] // n).tolist())
    return found


@pytest.mark.parametrize("seed", range(5))
def test_a_subset_keeps_whole_sequences_and_knows_their_places(seed):
    torch.manual_seed(seed)
    subsets = draw_subsets(LAYOUT, RATES, CPU)
    assert len(subsets) == len(RATES)
    for subset, rate in zip(subsets, RATES, strict=True):
        counts = [kept_sequences(batch, rate) for batch, _ in LAYOUT.shapes]
        assert subset.layout.shapes == tuple((s, n) for s, (_, n) in zip(counts, LAYOUT.shapes, strict=True))
        kept = sequences(subset)
        assert [len(set(part)) for part in kept] == counts
        assert torch.equal(subset.place[subset.rows], torch.arange(len(subset.rows)))
        expected = torch.zeros(TOKENS)
        expected[subset.rows] = torch.cat(
            [torch.full((s * n,), batch / s) for s, (batch, n) in zip(counts, LAYOUT.shapes, strict=True)]
        )
        torch.testing.assert_close(subset.weights.squeeze(1), expected, rtol=1e-7, atol=0.0)
        assert subset.place.min() >= 0 and subset.place.max() < len(subset.rows)


def test_every_sequence_is_kept_equally_often_and_each_rate_draws_for_itself():
    torch.manual_seed(0)
    draws = 3000
    kept = torch.zeros(2, 7)
    together = 0
    for _ in range(draws):
        first, second = (sequences(subset)[0] for subset in draw_subsets(LAYOUT, (0.55, 0.55), CPU))
        for number, chosen in enumerate((first, second)):
            kept[number, chosen] += 1
        together += len(set(first) & set(second))
    assert (kept / draws - 3 / 7).abs().max() < 0.04  # of seven sequences three
    assert together / draws == pytest.approx(3 * 3 / 7, abs=0.06)


def test_nothing_is_drawn_without_a_rate():
    state = torch.get_rng_state()
    assert draw_subsets(LAYOUT, (), CPU) == []
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_of_taking_and_adding(dtype):
    torch.manual_seed(1)
    (subset,) = draw_subsets(LAYOUT, (0.4,), CPU)
    x = torch.randn(1, TOKENS, WIDTH).requires_grad_()
    gain = torch.randn(WIDTH, dtype=dtype).requires_grad_()
    output_gradient = torch.randn(1, TOKENS, WIDTH)

    def results(output):
        return output, *torch.autograd.grad(output, (x, gain), output_gradient)

    got = results(subset.add(x, subset.take(x).to(dtype) * gain))
    parts = x[:, subset.rows].to(dtype) * gain
    weighted = subset.weights[subset.rows] * parts
    wanted = results(x.index_add(1, subset.rows, weighted.to(x.dtype)))
    for one, other in zip(got, wanted, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=1e-6 if dtype == torch.float32 else 2e-2, atol=1e-5)
