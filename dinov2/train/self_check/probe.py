"""What the checks look at: the run as it stands before its first step, and a few of its own images.

Shapes: B images per process, L local crops per image, N patches of a global crop, R registers, D width.
"""

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils.data import Dataset

from dinov2.compiled import uncompiled
from dinov2.data.data_order import DataOrder
from dinov2.data.device_crops import finish_batch
from dinov2.errors import DatasetError
from dinov2.fsdp.sharding import whole_copy
from dinov2.loss.centering import CenteredLoss
from dinov2.train.initial_weights import InitialWeights
from dinov2.train.input import ReproducibleSamples, build_collate, build_sampler, own_streams
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.train.undisturbed import undisturbed

IMAGES_COMPARED = 8
IMAGES_RUN = 4  # of them are augmented and go through the networks
CROPS_RUN = 2  # per size, where one pass shows what several would

# "blocks.7.", chunked "blocks.1.7.", inside an adapter "model.blocks.7.", transformers' "encoder.layer.7."
_BLOCK = re.compile(r"(?:^|\.)(?:blocks\.(?:\d+\.)?|layers?\.)(\d+)(?=\.)")


@dataclass(frozen=True)
class Start:
    """A run that is ready for its first step, and the images it will see in it."""

    cfg: DictConfig
    model: SSLMetaArch
    optimizer: torch.optim.Optimizer
    dataset: Dataset
    initial: InitialWeights
    start_iteration: int
    continues: bool  # from a checkpoint in the output directory
    tiles: list[tuple[int, str]]  # the first ones: index into the dataset, digest of the picture
    images: dict[str, Any]  # the first few of them, collated

    @property
    def is_fresh(self) -> bool:
        """Whether the weights are those of ``initial``, not those of a checkpoint of training."""
        return not self.continues and not self.cfg.MODEL.WEIGHTS

    @cached_property
    def student(self) -> nn.Module:
        """The student's backbone, as a whole copy if it is sharded: every process must ask first."""
        return whole_copy(self.model.student["backbone"])

    @cached_property
    def passes(self) -> "Passes":
        """A few crops through the student's backbone."""
        return run_student(self)


@dataclass(frozen=True)
class Passes:
    """What the student's backbone returns in evaluation mode, in float32, for crops of every size."""

    masks: Tensor  # [CROPS_RUN, N]
    masked: dict[str, Any]  # global crops, in one call with the local crops
    plain: dict[str, Any]  # the same without masks
    masked_alone: dict[str, Any]  # the same as masked, in a call of their own
    local: dict[str, Any] | None
    local_alone: dict[str, Any] | None
    block_runs: int  # how often a block ran in the one call


def find_start(
    cfg: DictConfig,
    model: SSLMetaArch,
    optimizer: torch.optim.Optimizer,
    dataset: Dataset,
    initial: InitialWeights,
    start_iteration: int,
    continues: bool,
    order: DataOrder | None = None,
) -> Start:
    """Fetch the first images of this process's stream, as the loader would.

    An unreadable one is replaced as it will be in the run, which counts it. Tiles without a digest are left
    out of the comparison.

    Raises:
        DatasetError: none of the images can be read.
    """
    sampler = build_sampler(cfg, dataset, start_iteration, order=order)
    keys = list(islice(sampler, min(IMAGES_COMPARED, cfg.train.batch_size_per_gpu)))
    samples = ReproducibleSamples(dataset, cfg.train.seed, own_streams(cfg)[0])
    collate = build_collate(cfg, model.precision.input_dtype)
    collated = collate([samples[key] for key in keys[:IMAGES_RUN]])
    images = finish_batch(collated, model.device, model.precision.input_dtype)
    digests = [(index, _digest(dataset, index)) for _, index in keys]
    tiles = [(index, digest) for index, digest in digests if digest]
    return Start(cfg, model, optimizer, dataset, initial, start_iteration, continues, tiles, images)


def _digest(dataset: Any, index: int) -> str:
    """A digest of a tile's file, or of its first crop from fixed random numbers; empty if unreadable."""
    try:
        if hasattr(dataset, "get_image_data"):
            return hashlib.sha256(dataset.get_image_data(index)).hexdigest()
        crops = ReproducibleSamples(dataset, seed=0, rank=0)[(0, index)][0]
    except (OSError, DatasetError):
        return ""
    return hashlib.sha256(crops["global_crops"][0].contiguous().numpy().tobytes()).hexdigest()


def run_student(start: Start) -> Passes:
    """Run a few global crops, masked and not, and a few local crops, together and apart."""
    device, images = start.model.device, start.images
    most_masked = images["collated_masks"].sum(dim=1).argsort(descending=True)[:CROPS_RUN]
    crops = [images["collated_global_crops"][most_masked].to(device).float()]
    masks = [images["collated_masks"][most_masked].to(device)]
    if start.model.num_local_crops:
        crops.append(images["collated_local_crops"][:CROPS_RUN].to(device).float())
        masks.append(None)
    student = start.student.eval()
    with counted_calls(_first_block(student)) as runs:
        masked = student(crops, masks=masks, is_training=True)
    plain = student(crops, masks=[None] * len(crops), is_training=True)
    alone = [student(c, masks=m, is_training=True) for c, m in zip(crops, masks, strict=True)]
    local, local_alone = (masked[1], alone[1]) if len(crops) > 1 else (None, None)
    return Passes(masks[0], masked[0], plain[0], alone[0], local, local_alone, len(runs))


def block_of(name: str) -> int | None:
    """Return the number of the transformer block that a parameter belongs to, None outside of blocks."""
    match = _BLOCK.search(name)
    return int(match[1]) if match else None


def blocks_of(backbone: nn.Module) -> dict[int, nn.Module]:
    """Return number -> transformer block, found by the names of the parameters."""
    found: dict[int, nn.Module] = {}
    for name, _ in backbone.named_parameters():
        match = _BLOCK.search(name)
        if match:
            found.setdefault(int(match[1]), backbone.get_submodule(name[: match.end()]))
    return dict(sorted(found.items()))


def _first_block(backbone: nn.Module) -> nn.Module | None:
    return next(iter(blocks_of(backbone).values()), None)


@contextmanager
def counted_calls(module: nn.Module | None) -> Iterator[list[None]]:
    """Collect one entry per forward pass of ``module``."""
    calls: list[None] = []
    if module is None:
        yield calls
        return
    hook = module.register_forward_hook(lambda *_: calls.append(None))
    try:
        yield calls
    finally:
        hook.remove()


@contextmanager
def unchanged(model: SSLMetaArch, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Leave random generators, modes, loss centres and learning rates as they are found; no gradients.

    Nothing is compiled for shapes that only the checks use.
    """
    centers = [(loss, _center(loss)) for loss in model.modules() if isinstance(loss, CenteredLoss)]
    rates = [(group, group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    try:
        with undisturbed(model), uncompiled():
            yield
    finally:
        for loss, (center, pending) in centers:
            _restore_center(loss, center, pending)
        for group, lr, weight_decay in rates:
            group["lr"], group["weight_decay"] = lr, weight_decay


def _center(loss: CenteredLoss) -> tuple[Tensor, Tensor | None]:
    """Return the centre and the summed statistics of a pending update of it."""
    if loss.reduce_handle is not None:
        loss.reduce_handle.wait()
        loss.reduce_handle = None
    return loss.center.clone(), loss.async_batch_center


def _restore_center(loss: CenteredLoss, center: Tensor, pending: Tensor | None) -> None:
    loss.apply_center_update()  # waits for a reduction that a probe has started
    loss.center.copy_(center)
    loss.async_batch_center = pending
    loss.updated = pending is None
