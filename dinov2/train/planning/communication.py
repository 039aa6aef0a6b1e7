"""What the processes send each other in a step, and how long that takes.

A ring over n processes sends, per process, (n-1)/n of the size of what is gathered or reduce-scattered, and
twice that for an all-reduce. With P parameters of the student's part, p bytes per gathered and r per reduced
element:

- ``NO_SHARD``: an all-reduce of float32 gradients after the backward pass, not overlapped: ``2 * 4 P``;
- ``SHARD_GRAD_OP``: gather once, reduce-scatter once: ``(p + r) P``; the teacher's gather ``p P``;
- ``FULL_SHARD``: gather for forward and backward: ``(2 p + r) P``, and the teacher's ``p P``;
- ``HYBRID_SHARD``: the same inside a group; between the m groups an all-reduce of the shards, of which all
  processes of a machine together send ``2 (m-1)/m r P``.

A ring through several machines leaves and enters each once, so it is as slow as the slower of a GPU's link
and a machine's link. The losses are latency: per Sinkhorn-Knopp one maximum and one sum of K numbers per
iteration, each of which is waited for; with centring one sum per loss, which is not.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from dinov2.train.planning.hardware import FABRICS, Fabric
from dinov2.train.planning.workload import Workload

SINKHORN_ITERATIONS = 3
FLOAT32 = 4


@dataclass(frozen=True)
class Sizes:
    """Parameters of a network and bytes per element."""

    student: int
    trainable: int
    teacher: int
    units: int
    gathered: int  # bytes per gathered element
    reduced: int  # bytes per reduced gradient element


@dataclass(frozen=True)
class Traffic:
    """Per step: bytes sent by one process inside its machine and by its whole machine to others, and
    times."""

    inside: float  # bytes
    outside: float  # bytes
    overlapped: float  # seconds that can hide behind computing
    waited: float  # seconds that cannot


def step_traffic(
    strategy: str, sizes: Sizes, fabric: Fabric, *, processes: int, per_machine: int, work: Workload
) -> Traffic:
    """Return what one step of one strategy sends.

    Args:
        strategy: of all parts.
        sizes: of both networks together with their heads.
        fabric: links.
        processes: of the run, a multiple of ``per_machine`` if there are more.
        per_machine: GPUs of a machine, which are the groups of HYBRID_SHARD.
        work: losses and prototypes.
    """
    if processes == 1:
        return Traffic(0.0, 0.0, 0.0, 0.0)
    machines = max(1, processes // per_machine)
    losses = loss_seconds(work, fabric, processes=processes, machines=machines)
    gathers = {"SHARD_GRAD_OP": 1, "FULL_SHARD": 2, "HYBRID_SHARD": 2}
    if strategy == "NO_SHARD":
        sent = 2 * _ring(processes) * FLOAT32 * sizes.trainable
        buckets = FLOAT32 * sizes.trainable // (32 * 2**20) + 1
        seconds = _seconds(sent, fabric, machines) + buckets * _latency(fabric, machines)
        return Traffic(sent, sent if machines > 1 else 0.0, 0.0, seconds + losses)
    gathered = sizes.gathered * (gathers[strategy] * sizes.student + sizes.teacher)
    volume = gathered + sizes.reduced * sizes.trainable
    collectives = sizes.units * (gathers[strategy] + 2)
    if strategy == "HYBRID_SHARD" and machines > 1:
        inside = _ring(per_machine) * volume
        outside = 2 * _ring(machines) * sizes.reduced * sizes.trainable
        seconds = _seconds(inside, fabric, 1) + outside / (1e9 * fabric.outside)
        seconds += collectives * fabric.latency + sizes.units * fabric.latency_outside
        return Traffic(inside, outside, seconds, losses)
    sent = _ring(processes) * volume
    seconds = _seconds(sent, fabric, machines) + collectives * _latency(fabric, machines)
    return Traffic(sent, sent if machines > 1 else 0.0, seconds, losses)


def loss_seconds(work: Workload, fabric: Fabric, *, processes: int, machines: int) -> float:
    """Return the seconds a step waits for collectives of its losses; those of centring are not waited for."""
    waited = 1  # the sum of the logged losses
    size = 0.0
    for head, on in ((work.dino_head, work.dino), (work.ibot_head or work.dino_head, work.ibot)):
        if on and work.sinkhorn:
            waited += 1 + SINKHORN_ITERATIONS
            size += SINKHORN_ITERATIONS * FLOAT32 * head.prototypes
    return waited * _latency(fabric, machines) + _seconds(2 * _ring(processes) * size, fabric, machines)


def _ring(count: int) -> float:
    return (count - 1) / count


def _latency(fabric: Fabric, machines: int) -> float:
    return fabric.latency if machines == 1 else fabric.latency_outside


def _seconds(sent: float, fabric: Fabric, machines: int) -> float:
    speed = fabric.inside if machines == 1 else min(fabric.inside, fabric.outside)
    return sent / (1e9 * speed)


TABLE_PROCESSES = (8, 64, 256)
TABLE_STRATEGIES = ("NO_SHARD", "SHARD_GRAD_OP", "FULL_SHARD", "HYBRID_SHARD")
PAYS = 0.9  # share of the time that must be computing


def scaling_table(
    models: Sequence[tuple[str, Sizes, Workload, float]], *, fabric_name: str, per_machine: int = 8
) -> list[str]:
    """Return the lines of the table of docs/scaling.md for one fabric, in Markdown.

    Args:
        models: name, sizes, workload and seconds of computing per step of each.
        fabric_name: a key of FABRICS.
        per_machine: GPUs of a machine.
    """
    lines = [
        "| model | GPUs | strategy | GB sent by a GPU | GB out of a machine | links, ms | waiting, ms "
        "| computing, ms | efficiency |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, sizes, work, compute in models:
        for processes in TABLE_PROCESSES:
            for strategy in TABLE_STRATEGIES:
                traffic = step_traffic(
                    strategy,
                    sizes,
                    FABRICS[fabric_name],
                    processes=processes,
                    per_machine=per_machine,
                    work=work,
                )
                low, high = efficiency(traffic, compute)
                mark = "" if low >= PAYS else (" (only if hidden)" if high >= PAYS else " (does not pay)")
                lines.append(
                    f"| {name} | {processes} | {strategy} | {traffic.inside / 1e9:.2f} "
                    f"| {traffic.outside / 1e9:.2f} | {1e3 * (traffic.overlapped + traffic.waited):.1f} "
                    f"| {1e3 * traffic.waited:.1f} | {1e3 * compute:.0f} "
                    f"| {100 * low:.0f} to {100 * high:.0f} %{mark} |"
                )
    return lines


def efficiency(traffic: Traffic, compute: float) -> tuple[float, float]:
    """Return the share of a step spent computing: when nothing is overlapped, and when all that can be is."""
    waited = compute + traffic.waited
    none = compute / (waited + traffic.overlapped)
    best = compute / (max(compute, traffic.overlapped) + traffic.waited)
    return none, best
