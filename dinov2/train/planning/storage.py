"""Disk of checkpoints and exports, and what loading needs of the host."""

from dataclasses import dataclass
from typing import Any

from dinov2.train.planning.activations import FLOAT32
from dinov2.train.planning.parameters import Networks
from dinov2.train.planning.workload import Workload

# Images per second and core, tiles of 224 px and of 512 px, by crops.pipeline: measured, CPU time, see
# docs/augmentation.md. A device pipeline leaves colours to the GPU.
IMAGES_PER_CORE = {"reference": (29, 22), "fast": (65, 58), "device": (306, 180)}

WORKER_BYTES = 500 * 2**20  # of a data loading process: Python, torch and its share of the dataset's index
PROCESS_BYTES = 4 * 2**30  # of a training process: libraries and CUDA's host side


@dataclass(frozen=True)
class Storage:
    """Bytes on disk."""

    checkpoint: int
    export: int
    run: int
    checkpoints_kept: int
    exports: int


def run_storage(cfg: Any, networks: Networks, iterations: int) -> Storage:
    """Return the disk a whole run takes: float32 weights of both networks and two moments per trained one.

    While a checkpoint is written the oldest is still there, so one more than are kept must fit.
    """
    weights = FLOAT32 * (networks.total("student") + networks.total("teacher"))
    checkpoint = weights + 2 * FLOAT32 * networks.total("trainable")
    period = cfg.checkpointing.period or 3 * cfg.train.OFFICIAL_EPOCH_LENGTH
    periodic = iterations // period
    kept = min(periodic, cfg.checkpointing.max_to_keep) + 1 + 1  # the final one, and the one being written
    if cfg.checkpointing.keep_every:
        kept += iterations // cfg.checkpointing.keep_every
    heads = sum(part.student + part.teacher for part in networks.parts if part.name != "backbone")
    # Teacher and student as a whole, and each of their heads in a file of its own. LoRA is merged.
    export = FLOAT32 * (2 * networks.total("teacher") + heads)
    every = cfg.evaluation.eval_period_iterations
    exports = -(-iterations // every) if every > 0 else 0
    return Storage(checkpoint, export, kept * checkpoint + exports * export, kept, exports)


def host_memory(cfg: Any, work: Workload, *, processes: int, crop_bytes: int, checkpoint: int) -> int:
    """Return the bytes of RAM a machine needs for ``processes`` training processes and their loaders.

    ``checkpoint`` is this machine's share of one: a copy of it stays in memory from save to save.
    """
    workers = cfg.train.num_workers
    batch = work.pixels * (1 if cfg.crops.pipeline == "device" else crop_bytes)
    prefetched = max(workers * (cfg.train.prefetch_factor or 2), 1) * batch
    return processes * (PROCESS_BYTES + workers * WORKER_BYTES + prefetched) + checkpoint
