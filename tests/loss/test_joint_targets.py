"""Targets of several micro-batches are those of as many processes, and of all their rows at once."""

import numpy as np
import pytest
import torch

from dinov2.compiled import uncompiled
from dinov2.loss import DINOLoss, iBOTPatchLoss
from dinov2.loss.targets import joint_sinkhorn_knopp, sinkhorn_knopp
from tests.distributed.launch import run_in_processes

K, SIZES = 13, (5, 0, 8, 1)


def chunks(sizes=SIZES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, K, generator=generator) * (1 + index) for index, n in enumerate(sizes)]


def test_sinkhorn_of_chunks_is_that_of_their_rows():
    parts = chunks()
    whole = sinkhorn_knopp(torch.cat(parts), 0.05).split(SIZES)
    joint = joint_sinkhorn_knopp(parts, 0.05)
    for expected, targets in zip(whole, joint, strict=True):
        torch.testing.assert_close(targets.dense(), expected, rtol=1e-4, atol=1e-7)
    apart = sinkhorn_knopp(parts[2], 0.05)
    assert (apart - whole[2]).abs().max() > 0.05, "the chunks do not matter to each other"


def test_what_is_compiled_computes_targets_in_float32_from_scores_in_bfloat16():
    """Run as it is written: a compiler may keep more digits than the code says, one that fails does not."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(40, 16, generator=generator), dim=1)
    parts = [part.bfloat16() for part in (directions[:25] @ directions.T, directions[25:] @ directions.T)]
    exact = sinkhorn_knopp(torch.cat(parts).double().float(), 0.04)
    with uncompiled():
        joint = joint_sinkhorn_knopp(parts, 0.04, compile=True)
    found = torch.cat([targets.dense() for targets in joint])
    torch.testing.assert_close(found, exact, rtol=2e-5, atol=1e-9)


def test_sinkhorn_of_one_chunk_is_the_plain_one_to_the_bit():
    (part,) = chunks((6,))
    before = part.clone()
    (targets,) = joint_sinkhorn_knopp([part], 0.05)
    assert torch.equal(targets.dense(), sinkhorn_knopp(part, 0.05))
    assert torch.equal(part, before)


def test_targets_of_nearly_equal_rows_sum_to_one():
    """As cls tokens have them at the start of a run: all exponentials of a row are nearly equal."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 65536, generator=generator) / 16 + 1e-4 * torch.randn(
        4, 65536, generator=generator
    )
    targets = sinkhorn_knopp(logits, 0.07)
    assert (targets.sum(dim=1, dtype=torch.float64) - 1.0).abs().max() < 1e-6


def test_several_chunks_are_kept_as_they_came():
    """Half the memory of float32 targets where the heads run in bf16, and nothing shared is overwritten."""
    parts = [part.bfloat16() for part in chunks()]
    before = [part.clone() for part in parts]
    joint = joint_sinkhorn_knopp(parts, 0.05)
    for targets, part in zip(joint, parts, strict=True):
        large = [v for v in vars(targets).values() if isinstance(v, torch.Tensor) and v.ndim == 2]
        assert len(large) == 1 and large[0] is part
    for targets, part, original in zip(joint, parts, before, strict=True):
        assert targets.dense().dtype == torch.float32
        assert torch.equal(part, original)


@pytest.mark.parametrize("loss_class", [DINOLoss, iBOTPatchLoss])
def test_one_center_for_all_chunks_of_a_step(loss_class):
    loss = loss_class(K)
    loss.center.copy_(torch.linspace(-1, 1, K).view(loss.center.shape))
    center = loss.center.clone().flatten()
    parts = chunks()
    joint = loss.center_jointly(parts, 0.1)
    for targets, part in zip(joint, parts, strict=True):
        torch.testing.assert_close(targets.dense(), torch.softmax((part - center) / 0.1, dim=-1))
    assert torch.equal(loss.center.flatten(), center), "moved within the step"
    loss.apply_center_update()
    if loss_class is DINOLoss:
        mean = torch.cat(parts).mean(dim=0)
    else:  # the mean of the means, of which a chunk without masked patches has none
        mean = torch.stack([part.mean(dim=0) for part in parts if len(part)]).mean(dim=0)
    torch.testing.assert_close(loss.center.flatten(), 0.9 * center + 0.1 * mean)


def targets_of_process(count):
    """What this process makes of its share of the same chunks, by every way in two steps; the two centers."""
    from dinov2 import distributed

    rank = distributed.get_global_rank()
    found = []
    dino, ibot = DINOLoss(K), iBOTPatchLoss(K)
    for step in range(2):
        share = chunks(seed=step)[rank * count : (rank + 1) * count]
        ways = [joint_sinkhorn_knopp(share, 0.05), dino.center_jointly(share, 0.1)]
        ways.append(ibot.center_jointly(share, 0.1))
        found.append([[targets.dense().numpy() for targets in way] for way in ways])
    for loss in (dino, ibot):
        loss.apply_center_update()
    return found, dino.center.numpy(), ibot.center.numpy()


@pytest.mark.slow
def test_chunks_of_two_processes_are_those_of_one():
    alone, *centers = targets_of_process(len(SIZES))
    (first, *centers_first), (second, *centers_second) = run_in_processes(targets_of_process, 2)
    for step in range(2):
        for way in range(3):
            together = first[step][way] + second[step][way]
            for got, expected in zip(together, alone[step][way], strict=True):
                np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-7)
    for got in (centers_first, centers_second):
        for center, expected in zip(got, centers, strict=True):
            np.testing.assert_allclose(center, expected, rtol=1e-5, atol=1e-7)
