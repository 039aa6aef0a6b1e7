"""The whole plan of a run: all formulas applied to one config and one set of GPUs, as numbers and as text."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from omegaconf import DictConfig

from dinov2.errors import ConfigError
from dinov2.models.checkpoint_names import NETWORKS
from dinov2.train.planning.communication import Sizes, Traffic, step_traffic
from dinov2.train.planning.flops import Flops, step_flops
from dinov2.train.planning.hardware import FABRICS
from dinov2.train.planning.memory import GIB, Layout, Memory, PartLayout, step_memory
from dinov2.train.planning.parameters import Networks, build_networks
from dinov2.train.planning.storage import IMAGES_PER_CORE, Storage, host_memory, run_storage
from dinov2.train.planning.workload import Workload
from dinov2.train.precision import Precision
from dinov2.train.run_length import total_iterations

LARGEST_BATCH = 2**24  # where the search for what fits ends


@dataclass(frozen=True)
class Machine:
    """What the plan is made for."""

    gpus: int
    gpus_per_node: int
    memory: float  # GiB of one GPU
    tflops: float  # peak, of the format that the student's backbone computes in
    mfu: float  # share of it that is reached
    fabric: str = "eight-cards"


@dataclass(frozen=True)
class Plan:
    """Everything that is calculated about a run."""

    machine: Machine
    networks: Networks
    layout: Layout
    work: Workload
    memory: Memory
    flops: Flops
    traffic: Traffic
    storage: Storage
    iterations: int
    tiles: int | None
    largest_batch: int  # 0 if not even one image fits
    wanted: tuple[int, int] | None  # batch and accumulate_steps for a wanted total batch
    host_bytes: int
    pipeline: str

    @property
    def images_per_step(self) -> int:
        """Images of one optimizer step, over all processes."""
        return self.work.batch * self.work.accumulate_steps * self.machine.gpus

    @property
    def step_seconds(self) -> float:
        """Seconds of one optimizer step, without those for communication that is not hidden."""
        images = self.work.batch * self.work.accumulate_steps
        return images * self.flops.executed / (1e12 * self.machine.tflops * self.machine.mfu)

    @property
    def images_per_second(self) -> float:
        """Images per second of all GPUs together."""
        return self.images_per_step / self.step_seconds

    @property
    def images(self) -> int:
        """Images of the whole run."""
        return self.images_per_step * self.iterations

    @property
    def fits(self) -> bool:
        """Whether the configured batch fits."""
        return self.memory.total <= self.machine.memory * GIB


def make_plan(
    cfg: DictConfig, machine: Machine, *, tiles: int | None = None, total_batch: int | None = None
) -> Plan:
    """Calculate a run.

    Args:
        cfg: resolved config, ``student.arch`` settled. Not changed.
        machine: GPUs.
        tiles: of the dataset, if known.
        total_batch: images per optimizer step to reach with the largest batch that fits.

    Raises:
        ConfigError: something does not go together; it says what.
    """
    networks = build_networks(cfg)
    layout = describe_layout(cfg, networks, machine)
    work = Workload.of(cfg, networks.backbone, batch=cfg.train.batch_size_per_gpu, mask_token_learns=True)
    held = layout["student", "backbone"]
    strategy = held.strategy if held.group > 1 else "NO_SHARD"
    sizes = network_sizes(networks, held)
    iterations = _iterations(cfg, work, machine, tiles)

    def fits(batch: int) -> bool:
        memory = _memory(cfg, networks, layout, machine, batch, work.accumulate_steps)
        return memory.total <= machine.memory * GIB

    largest = largest_that(fits)
    storage = run_storage(cfg, networks, iterations)
    here = min(machine.gpus, machine.gpus_per_node)
    return Plan(
        machine=machine,
        networks=networks,
        layout=layout,
        work=work,
        memory=step_memory(work, networks, layout, processes=machine.gpus),
        flops=step_flops(work),
        traffic=step_traffic(
            strategy,
            sizes,
            FABRICS[machine.fabric],
            processes=machine.gpus,
            per_machine=here,
            work=work,
        ),
        storage=storage,
        iterations=iterations,
        tiles=tiles,
        largest_batch=largest,
        wanted=_reach(total_batch, cfg, networks, layout, machine) if total_batch else None,
        host_bytes=host_memory(
            cfg,
            work,
            processes=here,
            crop_bytes=held.compute,
            checkpoint=storage.checkpoint * here // machine.gpus,
        ),
        pipeline=cfg.crops.pipeline,
    )


def describe_layout(cfg: DictConfig, networks: Networks, machine: Machine) -> Layout:
    """Return how every part is held on a GPU: formats of ``compute_precision``, and groups of its strategies.

    Raises:
        ConfigError: the groups of HYBRID_SHARD do not divide the number of GPUs.
    """
    precision = Precision(cfg.compute_precision, torch.device("cuda"))
    node = min(machine.gpus_per_node, machine.gpus)
    group = cfg.compute_precision.hybrid_shard_size or node
    layout = {}
    for network in NETWORKS:
        for part in networks.parts:
            section = cfg.compute_precision[network][part.name]
            strategy = section.sharding_strategy
            if strategy == "HYBRID_SHARD" and machine.gpus % group:
                raise ConfigError(
                    f"compute_precision.hybrid_shard_size makes groups of {group}, which do not divide "
                    f"--gpus {machine.gpus}: use a number of GPUs that is a multiple, or another group size"
                )
            groups = {"NO_SHARD": 1, "HYBRID_SHARD": group}
            layout[network, part.name] = PartLayout(
                strategy=strategy,
                group=groups.get(strategy, machine.gpus),
                compute=precision.dtypes[network, part.name].itemsize,
                reduce=4 if section.mixed_precision.reduce_dtype == "fp32" else 2,
                float16=precision.dtypes[network, part.name] == torch.float16,
            )
    return layout


def network_sizes(networks: Networks, held: PartLayout) -> Sizes:
    """Return what is communicated, in the formats of the student's backbone."""
    return Sizes(
        student=networks.total("student"),
        trainable=networks.total("trainable"),
        teacher=networks.total("teacher"),
        units=networks.total("units"),
        gathered=held.compute,
        reduced=held.reduce,
    )


def largest_that(fits: Any) -> int:
    """Return the largest batch for which ``fits(batch)`` holds, as for all smaller ones; 0 if none does."""
    if not fits(1):
        return 0
    low, high = 1, 2
    while high < LARGEST_BATCH and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _memory(
    cfg: DictConfig, networks: Networks, layout: Layout, machine: Machine, batch: int, steps: int
) -> Memory:
    work = Workload.of(cfg, networks.backbone, batch=batch, mask_token_learns=True)
    return step_memory(replace(work, accumulate_steps=steps), networks, layout, processes=machine.gpus)


def _reach(
    total: int, cfg: DictConfig, networks: Networks, layout: Layout, machine: Machine
) -> tuple[int, int]:
    """Return the fewest micro-batches that add up to ``total`` exactly and fit, with their size.

    Raises:
        ConfigError: no way of dividing it fits.
    """
    if total % machine.gpus:
        raise ConfigError(
            f"--total-batch {total} does not divide among --gpus {machine.gpus}: use a multiple of the GPUs"
        )
    per_gpu = total // machine.gpus
    for steps in range(1, per_gpu + 1):
        if per_gpu % steps == 0:
            memory = _memory(cfg, networks, layout, machine, per_gpu // steps, steps)
            if memory.total <= machine.memory * GIB:
                return per_gpu // steps, steps
    raise ConfigError(
        f"--total-batch {total} does not fit {machine.gpus} GPUs of {machine.memory:g} GiB with any "
        f"optim.accumulate_steps: {WHAT_HELPS}"
    )


def _iterations(cfg: DictConfig, work: Workload, machine: Machine, tiles: int | None) -> int:
    images = cfg.optim.max_images
    if cfg.optim.max_passes is not None:
        if tiles is None:
            raise ConfigError(
                "optim.max_passes is set, so the length of the run needs --tiles, the dataset's"
            )
        images = cfg.optim.max_passes * tiles
    if images is None:
        return total_iterations(cfg)
    return max(1, math.ceil(images / (work.batch * work.accumulate_steps * machine.gpus)))


WHAT_HELPS = (
    "set train.activation_checkpointing=full, shard (compute_precision.*.sharding_strategy FULL_SHARD on "
    "more GPUs), lower train.batch_size_per_gpu and raise optim.accumulate_steps, or use larger GPUs"
)


def as_json(plan: Plan) -> dict[str, Any]:
    """Return every number of the plan under plain names; bytes, seconds and FLOPs."""
    return {
        "machine": asdict(plan.machine),
        "parameters": [asdict(part) for part in plan.networks.parts],
        "layout": {f"{network}.{part}": asdict(held) for (network, part), held in plan.layout.items()},
        "memory": {
            "moments": plan.memory.moments,
            "peak_moment": plan.memory.peak_moment,
            "allocated": plan.memory.allocated,
            "total": plan.memory.total,
            "fits": plan.fits,
        },
        "flops_per_image": {**asdict(plan.flops), "model": plan.flops.model, "executed": plan.flops.executed},
        "step_seconds": plan.step_seconds,
        "communication": asdict(plan.traffic),
        "images_per_second": plan.images_per_second,
        "iterations": plan.iterations,
        "images": plan.images,
        "passes": plan.images / plan.tiles if plan.tiles else None,
        "run_seconds": plan.step_seconds * plan.iterations,
        "storage": asdict(plan.storage),
        "host_bytes_per_node": plan.host_bytes,
        "largest_batch_size_per_gpu": plan.largest_batch,
        "for_total_batch": dict(zip(("batch_size_per_gpu", "accumulate_steps"), plan.wanted, strict=True))
        if plan.wanted
        else None,
    }


def as_text(plan: Plan) -> str:
    """Return the plan for reading."""
    return "\n".join(_lines(plan))


def _lines(plan: Plan) -> Iterator[str]:
    machine, work = plan.machine, plan.work
    yield f"plan for {machine.gpus} GPUs of {machine.memory:g} GiB; all of it is calculated, nothing measured"
    yield ""
    yield "parameters, millions      student   trained   teacher"
    for part in plan.networks.parts:
        yield (
            f"  {part.name:22} {part.student / 1e6:8.1f}  {part.trainable / 1e6:8.1f}  "
            f"{part.teacher / 1e6:8.1f}"
        )
    yield ""
    yield from _memory_lines(plan)
    yield ""
    yield "arithmetic per image, GFLOP"
    for name, value in asdict(plan.flops).items():
        label, sign = ("left out, last block", -1) if name == "skipped" else (name.replace("_", " "), 1)
        yield f"  {label:22} {sign * value / 1e9:8.1f}"
    yield f"  {'computed':22} {plan.flops.executed / 1e9:8.1f}"
    yield ""
    yield f"speed at {100 * machine.mfu:g} % of {machine.tflops:g} TFLOP/s, if loading keeps up"
    yield f"  {1 / plan.step_seconds:.3g} steps/s, {plan.images_per_second:.0f} images/s on all GPUs"
    traffic = plan.traffic
    if machine.gpus > 1:
        yield (
            f"  communication ({machine.fabric}): {traffic.inside / 1e9:.2f} GB sent by each GPU per step, "
            f"{1e3 * traffic.overlapped:.1f} ms that can be hidden, {1e3 * traffic.waited:.1f} ms that "
            f"cannot, beside {1e3 * plan.step_seconds:.0f} ms of computing"
        )
    yield from _run_lines(plan)
    yield ""
    yield from _batch_lines(plan)
    if work.frozen_blocks:
        yield (
            "note: the mask token is assumed to be trained, as it is where the weights lack one; else frozen "
            "blocks need less memory and arithmetic"
        )


def _memory_lines(plan: Plan) -> Iterator[str]:
    work, memory = plan.work, plan.memory
    held = plan.layout["student", "backbone"]
    how = "not sharded" if held.group == 1 else f"{held.strategy} over {held.group}"
    yield (
        f"memory per GPU, GiB, batch {work.batch} x {work.accumulate_steps}, {how}, activation checkpointing "
        f"{work.checkpointing}"
    )
    yield f"  highest at the moment: {memory.peak_moment}"
    for name, size in memory.parts.items():
        yield f"  {name:32} {size / GIB:8.2f}"
    yield f"  {'allocated by PyTorch':32} {memory.allocated / GIB:8.2f}"
    yield f"  {'CUDA, libraries, fragmentation':32} {(memory.total - memory.allocated) / GIB:8.2f}"
    yield f"  {'all':32} {memory.total / GIB:8.2f}  of {plan.machine.memory:g}"
    others = (f"{name} {sum(parts.values()) / GIB:.2f}" for name, parts in memory.moments.items())
    yield f"  allocated at each moment: {', '.join(others)}"


def _run_lines(plan: Plan) -> Iterator[str]:
    seconds = plan.step_seconds * plan.iterations
    storage = plan.storage
    passes = f", {plan.images / plan.tiles:.3g} passes over {plan.tiles:,} tiles" if plan.tiles else ""
    yield ""
    steps = f"{plan.iterations:,} steps of {plan.images_per_step:,} images"
    yield f"run of {steps}: {plan.images:,} images{passes}"
    yield f"  {seconds / 3600:.1f} hours, {seconds / 3600 * plan.machine.gpus:.0f} GPU-hours"
    yield (
        f"  disk: {storage.checkpoint / 1e9:.2f} GB per checkpoint, at most {storage.checkpoints_kept} at a "
        f"time; {storage.exports} exports of {storage.export / 1e9:.2f} GB; {storage.run / 1e9:.1f} GB in all"
    )
    per_gpu = plan.images_per_second / plan.machine.gpus
    small, large = IMAGES_PER_CORE[plan.pipeline]
    yield (
        f"  loading: {per_gpu:.0f} images/s per GPU; with crops.pipeline={plan.pipeline} that is "
        f"{math.ceil(per_gpu / small)} cores per GPU for tiles of 224 px, {math.ceil(per_gpu / large)} for "
        "512 px (docs/augmentation.md)"
    )
    yield f"  host memory: about {plan.host_bytes / GIB:.0f} GiB per machine"


def _batch_lines(plan: Plan) -> Iterator[str]:
    memory = f"{plan.machine.memory:g} GiB"
    if plan.largest_batch == 0:
        yield f"not even one image fits {memory}: {WHAT_HELPS}"
        return
    verdict = "fits" if plan.fits else "does NOT fit"
    yield (
        f"train.batch_size_per_gpu={plan.work.batch} {verdict} {memory}; the largest that does is "
        f"{plan.largest_batch}"
    )
    if not plan.fits:
        yield f"  to keep the batch: {WHAT_HELPS}"
    if plan.wanted:
        batch, steps = plan.wanted
        yield (
            f"for {batch * steps * plan.machine.gpus:,} images per step: train.batch_size_per_gpu={batch} "
            f"optim.accumulate_steps={steps}"
        )
