"""What a training step asks of the device, in counts that are the same on every machine.

The bounds are what the step needs today. A change that raises one makes training slower on a GPU, whatever a
CPU's clock says; one that lowers one may lower the bound here. docs/performance.md says what is counted.
"""

from dataclasses import replace
from functools import cached_property

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.torch_version import TorchVersion

from dinov2.compiled import MOST_VARIANTS
from dinov2.layers.dino_head import WeightNormLinear
from dinov2.layers.packing import PackedLayout
from dinov2.loss import DINOLoss, iBOTPatchLoss
from dinov2.loss.targets import joint_sinkhorn_knopp
from dinov2.models.vision_transformer import vit_small
from dinov2.train.cuda_graphs import WARM_UP_STEPS
from dinov2.train.head_losses import Entry, dino_entries, head_loss
from dinov2.train.optimizer import build_optimizer
from dinov2.train.planning.flops import patch_flops, step_flops
from dinov2.train.step import train_step
from scripts.speed.counts import Counts, count, host_tensors
from tests.train.planning.steps import SMALL, VALUES, build, random_batch, resolve, workload
from tests.train.waits import reported_waits

SIZES = ("student.embed_dim=48", "student.num_heads=3", "crops.local_crops_number=2")

# Waits of the host between two batches: losses and gradient norms come back together, and on them depends
# whether the weights move.
WAITS_PER_STEP = 1
OTHER_COPIES = 0  # beside those of the batch

OPERATORS = {"sinkhorn_knopp": 700, "centering": 660}

# Of prototypes, losses and targets at DINOv2's size, 65,536 prototypes and logits in bfloat16: megabytes per
# image, and those once per step, of the prototypes: beyond a cache of 16 MiB, of every operator without a
# cache, and of the kernels that they are compiled to for a GPU.
CACHE = 2**24
MEGABYTES = {
    "sinkhorn_knopp": ((109.0, 745.0), (890.0, 760.0), (143.0, 780.0)),
    "centering": ((88.5, 745.0), (436.0, 745.0), (91.0, 755.0)),
}
PROTOTYPES, BOTTLENECK, MASKED_PER_IMAGE, LOCAL_CROPS = 65536, 256, 76.8, 8


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
    assert run.count(lambda: run.model.forward_backward(run.batch, 0.07)).waits == []
    run.optimizer.zero_grad()


def test_a_step(run):
    counts = run.counts
    assert len(counts.waits) <= WAITS_PER_STEP, [str(event) for event in counts.waits]
    assert counts.launches <= OPERATORS[run.cfg.train.centering], counts.operators
    used = ("collated_global_crops", "collated_local_crops", "collated_masks")
    used += ("mask_indices_list", "masks_weight")
    assert len(counts.copies) <= len(used) + OTHER_COPIES, [str(event) for event in counts.copies]
    batch_bytes = sum(run.batch[name].nbytes for name in used)
    assert sum(event.bytes for event in counts.copies) <= batch_bytes + 16


def test_a_step_computes_what_the_model_needs_and_no_more(run):
    work = workload(run.cfg)
    patches = work.vit.patches(work.global_pixels)
    masked = run.batch["n_masked_patches"].item() / (2 * work.batch * patches)
    needed = work.batch * step_flops(replace(work, masked_share=masked)).executed
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


class PrototypeStep:
    """Targets, losses and gradients of a batch at DINOv2's size, of values that do not matter."""

    def __init__(self, images: int) -> None:
        masked = round(images * MASKED_PER_IMAGE)
        self.rows = {"global": 2 * images, "local": LOCAL_CROPS * images, "patches": masked}
        self.layer = WeightNormLinear(BOTTLENECK, PROTOTYPES)
        self.features = {
            name: torch.empty(n, BOTTLENECK, requires_grad=True) for name, n in self.rows.items()
        }
        self.logits = [
            torch.empty(self.rows[name], PROTOTYPES, dtype=torch.bfloat16) for name in ("global", "patches")
        ]
        self.losses = DINOLoss(PROTOTYPES), iBOTPatchLoss(PROTOTYPES)

    def run(self, centering: str, *, compile: bool) -> None:
        if centering == "centering":
            pairs = zip(self.losses, self.logits, strict=True)
            made = [loss.center_jointly([part], 0.07) for loss, part in pairs]
        else:
            made = [joint_sinkhorn_knopp([part], 0.07, compile=compile) for part in self.logits]
        (cls,), (patches,) = made
        entries = dino_entries(self.features["global"], self.features["local"], cls, 1.0)
        weights = torch.empty(len(patches))
        entries.append(Entry("ibot", self.features["patches"], weights, [patches], 1.0))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            total, _ = head_loss(self.layer, entries, 0.1, compile=compile)
        total.backward()


@pytest.mark.parametrize("images", [4, pytest.param(64, marks=pytest.mark.slow)])
@pytest.mark.parametrize("centering", MEGABYTES)
def test_bytes_that_prototypes_losses_and_targets_move(centering, images):
    """Counted on tensors without values, of the sizes of a real run."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        step = PrototypeStep(images)
        with count(cache_bytes=CACHE) as counts:
            step.run(centering, compile=False)
    beyond_cache, of_operators, _ = MEGABYTES[centering]
    assert counts.memory_bytes <= allowed(beyond_cache, images)
    assert counts.bytes + counts.product_bytes <= allowed(of_operators, images)
    # The teacher's logits are read once, the student's written, read, replaced and read again, at the least.
    teacher, student = step.rows["global"] + step.rows["patches"], sum(step.rows.values())
    assert counts.memory_bytes >= 2 * PROTOTYPES * (teacher + 4 * student)


def counting_compiler(monkeypatch, *users: str):
    """By the kernels that the compiler makes for a GPU; no cache."""
    pytest.importorskip("triton")
    from scripts.speed.compiled_bytes import CompiledBytes

    compiler = CompiledBytes()
    for user in users:
        monkeypatch.setattr(f"dinov2.{user}.compiled", compiler.compiled)
    monkeypatch.setattr("dinov2.layers.layer_norm.DEVICES", ("cpu",))  # where it stands in for a GPU
    torch._dynamo.reset()
    return compiler


# What compiled code moves is also the doing of the compiler.
of_its_compiler = pytest.mark.skipif(
    TorchVersion(torch.__version__) < (2, 13), reason="counted of the kernels of PyTorch 2.13"
)


@pytest.mark.slow
@of_its_compiler
@pytest.mark.parametrize("images", [4, 64])
@pytest.mark.parametrize("centering", MEGABYTES)
def test_bytes_that_they_move_as_compiled_kernels(centering, images, monkeypatch):
    compiler = counting_compiler(monkeypatch, "loss.prototypes", "loss.targets")
    step = PrototypeStep(images)
    with torch._dynamo.config.patch(recompile_limit=MOST_VARIANTS), count() as counts:
        step.run(centering, compile=True)
    moved = compiler.bytes + counts.bytes + counts.product_bytes
    assert compiler.bytes and moved <= allowed(MEGABYTES[centering][2], images)


# Of a block of ViT-S/14, 2 x 224 + 8 x 98 px, bfloat16, the student with stochastic depth of 0.3: kernels
# between its products and attention, megabytes per image, and those once per step, of the weights. Small
# batches move more per image: Inductor merges sums over rows and over columns from 5 million numbers on.
BLOCK_MEGABYTES = {"student": (40.0, 24.0), "teacher": (8.4, 10.8)}


@pytest.mark.slow
@of_its_compiler
@pytest.mark.parametrize("images", [64, 128])
@pytest.mark.parametrize("network", BLOCK_MEGABYTES)
def test_bytes_that_a_block_moves_as_compiled_kernels(network, images, monkeypatch):
    compiler = counting_compiler(monkeypatch, "layers.block")
    learns = network == "student"
    rate = 0.3 if learns else 0.0
    (block,) = vit_small(
        depth=1, block_chunks=0, init_values=1e-5, drop_path_rate=rate, drop_path_uniform=True
    ).blocks
    block.set_compiled()
    block.train(learns).requires_grad_(learns)
    layout = PackedLayout(((2 * images, 257), (LOCAL_CROPS * images, 50))[: 1 + learns])
    x = torch.empty(1, sum(b * n for b, n in layout.shapes), 384, requires_grad=learns)
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(learns):
        result = block(x, layout)
    if learns:
        result.backward(torch.empty_like(result))
    assert compiler.bytes and compiler.bytes <= allowed(BLOCK_MEGABYTES[network], images)


def allowed(megabytes: tuple[float, float], images: int) -> float:
    """Return the bytes of a batch."""
    per_image, per_step = megabytes
    return 1e6 * (images * per_image + per_step)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("number_format", ["fp32", "bf16"])
def test_waits_that_cuda_itself_reports(number_format):
    run = Run("train.centering=sinkhorn_knopp", device="cuda", number_format=number_format)
    run.batch = {
        name: value.pin_memory() if isinstance(value, torch.Tensor) else value
        for name, value in run.batch.items()
    }
    for _ in range(WARM_UP_STEPS + 1):  # in the last of these its blocks are recorded
        run.step()

    assert reported_waits(lambda: run.model.forward_backward(run.batch, 0.07)) == []
    found = reported_waits(run.step)
    assert len(found) <= WAITS_PER_STEP, found
