"""Memory of one process over a training step, bytes.

A step has moments at which memory can be highest; each is added up by part, and the highest is the peak:

- ``targets``: the teacher's scores become targets, a tile at a time; the student has not run yet.
- ``losses``: the student has run, everything for its backward pass is there, and so are the teacher's scores,
  the student's of one block of rows, and gradients of the prototypes.
- ``heads done``: gradients of the heads exist, the backbone's activations still do.
- ``optimizer``: all gradients exist, activations are gone; AdamW's fused kernel makes no copies.

Always there: float32 weights of student and teacher and AdamW's two moments. Gradients are float32 and freed
at the beginning of a step. Under autocast every matrix has a copy in half precision until its backward pass;
with sharding the gathered parameters take its place. With k accumulated micro-batches the crops and the
teacher's scores of those to come wait on the device, and from the second on there are gradients in full.

With ``SHARD_GRAD_OP`` the student's parameters stay gathered from forward to backward, the teacher's until
the average is taken; with ``FULL_SHARD`` and ``HYBRID_SHARD`` a unit and the next one are gathered at a time.
Communication needs buffers for two units, in the format of parameters and of reduction.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from dinov2.loss.tiles import TILE_BYTES
from dinov2.train.compilation import is_wanted
from dinov2.train.planning.activations import FLOAT32, backbone_activations, head_memory
from dinov2.train.planning.parameters import Networks, Part
from dinov2.train.planning.workload import Workload

GIB = 2**30
BUCKET_BYTES = FLOAT32 * 8 * 2**20  # of average_gradients

TILES_ALIVE = 4  # of teacher and student, and what one operation on them makes

# Not allocated by PyTorch: CUDA context, kernels and libraries; with several processes NCCL's buffers.
CONTEXT_BYTES = int(0.8 * GIB)
NCCL_BYTES = int(0.7 * GIB)
# Of what PyTorch allocates: gaps between blocks of different sizes, and workspaces of matrix products.
FRAGMENTATION = 0.06


@dataclass(frozen=True)
class PartLayout:
    """How one backbone or head is held: number formats in bytes, and sharding."""

    strategy: str
    group: int  # processes that divide it
    compute: int  # bytes of the format of matrix products
    reduce: int  # bytes of the format in which gradients are reduced
    float16: bool = False  # whether that of matrix products is float16


Layout = Mapping[tuple[str, str], PartLayout]  # (student or teacher, part) -> how it is held


@dataclass(frozen=True)
class Memory:
    """Bytes by part at each moment of a step."""

    moments: dict[str, dict[str, int]]
    reserve: int  # outside PyTorch's allocations

    @property
    def peak_moment(self) -> str:
        """The moment at which most is allocated."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by part at the peak."""
        return self.moments[self.peak_moment]

    @property
    def allocated(self) -> int:
        """Most that is allocated at once, to be compared with ``torch.cuda.max_memory_allocated``."""
        return sum(self.parts.values())

    @property
    def total(self) -> int:
        """What the device must have: allocated, with fragmentation and what is outside of PyTorch."""
        return int(self.allocated * (1 + FRAGMENTATION)) + self.reserve


def step_memory(
    work: Workload, networks: Networks, layout: Layout, *, processes: int = 1, device: str = "cuda"
) -> Memory:
    """Return the memory of a step after the first, when the optimizer's moments exist.

    Args:
        work: a micro-batch.
        networks: their parameters by part.
        layout: number formats and sharding of every part that exists.
        processes: of the run.
        device: ``cuda`` or ``cpu``, on which the losses walk in tiles of other sizes.
    """
    parts = networks.parts
    student = {part.name: layout["student", part.name] for part in parts}
    teacher = {part.name: layout["teacher", part.name] for part in parts}
    sharded = any(held.group > 1 for held in (*student.values(), *teacher.values()))

    static = {
        "student weights": sum(FLOAT32 * part.student // student[part.name].group for part in parts),
        "teacher weights": sum(FLOAT32 * part.teacher // teacher[part.name].group for part in parts),
        "optimizer moments": sum(2 * FLOAT32 * part.trainable // student[part.name].group for part in parts),
    }
    gradients = {part.name: FLOAT32 * part.trainable // student[part.name].group for part in parts}
    held_gradients = _accumulated(parts, student, gradients)
    buffers = _buffers(parts, student) if sharded else 0
    teacher_copies = sum(_gathered_teacher(part, teacher[part.name]) for part in parts)
    teacher_stays = sum(
        _gathered_teacher(part, teacher[part.name])
        for part in parts
        if teacher[part.name].strategy == "SHARD_GRAD_OP" and teacher[part.name].group > 1
    )
    copies = {part.name: _student_copies(part, student[part.name], work.checkpointing) for part in parts}

    c = student["backbone"].compute
    kept = backbone_activations(
        work,
        c,
        sharded=student["backbone"].group > 1,
        float16=student["backbone"].float16,
        compiled=is_wanted(work.compile, device),
        device=device,
    )
    heads = {name: head_memory(work, name, student[name].compute) for name in work.heads}
    scores = {name: _teacher_scores(work, name, teacher[name].compute) for name in work.heads}
    largest_scores = max(
        (FLOAT32 * size // teacher[name].compute for name, size in scores.items()), default=0
    )
    tile = min(TILE_BYTES[device], largest_scores)
    one_waiting = kept.crops + sum(scores.values())
    steps = work.accumulate_steps

    # The first micro-batch has the most others waiting, the second is the first that finds gradients.
    waiting = {0: (steps - 1) * one_waiting, 1: (steps - 2) * one_waiting + sum(held_gradients.values())}
    extra = max(waiting[0], waiting[1]) if steps > 1 else 0
    waiting_or_gradients = {"accumulation": extra} if steps > 1 else {}
    after_heads = sum(held_gradients.values()) if steps > 1 else 0

    activations = {"activations": kept.blocks + kept.outputs, "input batch": kept.crops}
    moments = {
        "targets": {
            **static,
            "input batch": steps * kept.crops,
            "teacher, gathered or rounded": teacher_copies + buffers,
            "teacher scores": steps * sum(scores.values()),
            "tiles of targets": TILES_ALIVE * tile,
        },
        "losses": {
            **static,
            **activations,
            **waiting_or_gradients,
            "weights, gathered or rounded": sum(copies.values()) + teacher_stays + buffers,
            "heads": sum(head.activations for head in heads.values()),
            "teacher scores": sum(scores.values()),
            "student scores of a block": max(head.scoring for head in heads.values()),
            "tiles of targets": TILES_ALIVE * tile,
        },
        "heads done": {
            **static,
            **activations,
            "weights, gathered or rounded": copies["backbone"] + teacher_stays + buffers,
            "gradients": after_heads or sum(gradients[name] for name in heads),
            "recomputed block": kept.recomputed,
        },
        "optimizer": {
            **static,
            "gradients": sum(gradients.values()),
        },
    }
    if processes > 1 and any(held.group == 1 for held in student.values()):
        moments["optimizer"]["averaging"] = BUCKET_BYTES
    return Memory(moments, CONTEXT_BYTES + (NCCL_BYTES if processes > 1 else 0))


def _student_copies(part: Part, held: PartLayout, checkpointing: str) -> int:
    """Bytes of a student part's weights beside its float32 master copy, while activations exist."""
    if held.group > 1:
        whole = held.strategy == "SHARD_GRAD_OP"
        return held.compute * (part.student if whole else min(2 * part.largest_unit, part.student))
    if held.compute == FLOAT32:
        return 0
    one_block = checkpointing != "none" and part.name == "backbone"
    return held.compute * (min(part.largest_unit, part.cast) if one_block else part.cast)


def _gathered_teacher(part: Part, held: PartLayout) -> int:
    if held.group > 1:
        whole = held.strategy == "SHARD_GRAD_OP"
        return held.compute * (part.teacher if whole else min(2 * part.largest_unit, part.teacher))
    # Autocast rounds a weight that needs no gradient for one product only.
    return held.compute * part.largest_unit if held.compute < FLOAT32 else 0


def _buffers(parts: tuple[Part, ...], student: Mapping[str, PartLayout]) -> int:
    return max(
        2 * part.largest_unit * (student[part.name].compute + student[part.name].reduce) for part in parts
    )


def _accumulated(
    parts: tuple[Part, ...], student: Mapping[str, PartLayout], gradients: Mapping[str, int]
) -> dict[str, int]:
    """Bytes of gradients between micro-batches: SHARD_GRAD_OP keeps them whole until the last."""
    return {
        part.name: FLOAT32 * part.trainable
        if student[part.name].strategy == "SHARD_GRAD_OP"
        else gradients[part.name]
        for part in parts
    }


def _teacher_scores(work: Workload, name: str, c: int) -> int:
    return sum(work.rows(name, student=False)) * work.heads[name].prototypes * c
