"""What a training step asks of the device, in counts that are the same on every machine.

The bounds are what the step needs today. A change that raises one makes training slower on a GPU, whatever a
CPU's clock says; one that lowers one may lower the bound here. docs/performance.md says what is counted.
"""

import warnings
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dinov2.train.optimizer import build_optimizer
from dinov2.train.planning.flops import patch_flops, step_flops
from dinov2.train.precision import Precision
from dinov2.train.ssl_meta_arch import Batch, SSLMetaArch, StudentTokens, TeacherLogits
from dinov2.train.step import train_step
from scripts.speed.counts import Counts, count, host_tensors
from tests.train.planning.steps import SMALL, VALUES, build, random_batch, resolve, workload

SIZES = ("student.embed_dim=48", "student.num_heads=3", "crops.local_crops_number=2")

# Waits of the host between two batches: the batch's count of unreadable images goes to the device, and losses
# and the gradient norms of backbone and head come back, on which the decision to step depends.
WAITS_PER_STEP = 4
OTHER_COPIES = 1  # beside those of the batch

OPERATORS = {"sinkhorn_knopp": 700, "centering": 660}

# Of the losses and targets at DINOv2's size: batch 64, 65,536 prototypes, logits in bfloat16.
LOSS_GIGABYTES = {"sinkhorn_knopp": 52.0, "centering": 41.0}
PROTOTYPES, IMAGES, MASKED, LOCAL_CROPS = 65536, 64, 4915, 8


class Run:
    """A tiny run whose next step is to be counted."""

    def __init__(self, *overrides: str, device: str = "cpu", number_format: str = "fp32") -> None:
        self.cfg = resolve(*SMALL, *SIZES, *overrides, number_format=number_format)
        self.model = build(self.cfg, device)
        self.optimizer = build_optimizer(self.cfg, self.model.get_params_groups())
        self.batch = random_batch(self.cfg, self.model.precision.input_dtype)
        self.step()  # makes the optimizer's state

    def step(self) -> None:
        train_step(self.model, self.optimizer, self.batch, VALUES, 3.0)

    def count(self, function) -> Counts:
        with count(host_tensors(self.batch, self.optimizer)) as counts:
            function()
        return counts

    @cached_property
    def counts(self) -> Counts:
        return self.count(self.step)


@pytest.fixture(scope="module", params=["sinkhorn_knopp", "centering"])
def run(request) -> Run:
    return Run(f"train.centering={request.param}")


def test_nothing_waits_between_the_batch_and_the_gradients(run):
    counts = run.count(lambda: run.model.forward_backward(run.batch, 0.07))
    if run.cfg.train.centering == "centering":
        # The number of rows becomes a tensor on the device, once for each of the two centres.
        assert {event.what for event in counts.waits} == {"new_tensor"} and len(counts.waits) == 2
    else:
        assert counts.waits == []
    run.optimizer.zero_grad()


def test_a_step(run):
    counts = run.counts
    more = 2 * (run.cfg.train.centering == "centering")
    assert len(counts.waits) <= WAITS_PER_STEP + more, [str(event) for event in counts.waits]
    assert counts.launches <= OPERATORS[run.cfg.train.centering], counts.operators
    used = ("collated_global_crops", "collated_local_crops", "collated_masks")
    used += ("mask_indices_list", "masks_weight")
    assert len(counts.copies) <= len(used) + OTHER_COPIES + more, [str(event) for event in counts.copies]
    batch_bytes = sum(run.batch[name].nbytes for name in used)
    assert sum(event.bytes for event in counts.copies) <= batch_bytes + 16


def test_a_step_computes_what_the_model_needs_and_no_more(run):
    work = workload(run.cfg)
    patches = work.vit.patches(work.global_pixels)
    masked = run.batch["n_masked_patches"].item() / (2 * work.batch * patches)
    needed = work.batch * step_flops(replace(work, masked_share=masked)).model
    # Images need no gradient, and the backward pass of attention makes the scores anew.
    crops = ((2, work.global_pixels), (work.local_crops, work.local_pixels))
    needed -= work.batch * sum(number * patch_flops(work.vit, pixels) for number, pixels in crops)
    assert needed <= run.counts.flops <= 1.05 * needed


def test_operators_do_not_multiply_with_the_batch(run):
    cfg = run.cfg.copy()
    cfg.train.batch_size_per_gpu *= 2
    twice = random_batch(cfg)
    before = run.counts.launches
    run.batch, kept = twice, run.batch
    assert run.count(run.step).launches == before
    run.batch = kept


@pytest.mark.parametrize("centering", LOSS_GIGABYTES)
def test_bytes_that_losses_and_targets_move(centering):
    """Counted on tensors without values, of the sizes of a real run."""
    prototypes = (f"dino.head_n_prototypes={PROTOTYPES}", "dino.head_bottleneck_dim=1")
    cfg = resolve(*SMALL, f"train.centering={centering}", *prototypes, number_format="bf16")
    model = SSLMetaArch(cfg)
    model.precision = Precision(cfg.compute_precision, model.device)
    cls, local = 2 * IMAGES, LOCAL_CROPS * IMAGES
    with FakeTensorMode(allow_non_fake_inputs=True):
        teacher = TeacherLogits(
            *(torch.empty(rows, PROTOTYPES, dtype=torch.bfloat16) for rows in (cls, MASKED))
        )
        student = StudentTokens(
            *(torch.empty(rows, model.embed_dim, requires_grad=True) for rows in (cls, local, MASKED))
        )
        masks = torch.empty(cls, 256, dtype=torch.bool)
        batch = Batch(None, None, masks, torch.empty(MASKED, dtype=torch.long), torch.empty(MASKED))
        with count() as counts:
            (targets,) = model.assign_targets([teacher], 0.07)
            model.combine_losses(batch, targets, student).total.backward()
    assert counts.bytes <= 1e9 * LOSS_GIGABYTES[centering], counts.bytes_by_operator
    # Each of the teacher's logits is read once at the very least.
    least = 2 * PROTOTYPES * (cls + MASKED)
    assert counts.bytes >= least


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("number_format", ["fp32", "bf16"])
def test_waits_that_cuda_itself_reports(number_format):
    run = Run("train.centering=sinkhorn_knopp", device="cuda", number_format=number_format)
    run.batch = {
        name: value.pin_memory() if isinstance(value, torch.Tensor) else value
        for name, value in run.batch.items()
    }
    run.step()

    def reported(function) -> list[str]:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        lines = [warning for warning in caught if "synchronizing CUDA operation" in str(warning.message)]
        return [f"{Path(line.filename).name}:{line.lineno}" for line in lines]

    assert reported(lambda: run.model.forward_backward(run.batch, 0.07)) == []
    found = reported(run.step)
    assert len(found) <= WAITS_PER_STEP, found
