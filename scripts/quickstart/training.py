"""Runs the trainer as a user would, under torchrun, and finds what it left."""

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from dinov2.configs import resolve_config
from dinov2.errors import UserError
from dinov2.train.run_length import total_iterations
from scripts.quickstart.tiles import TileSet

REPO = Path(__file__).resolve().parents[2]
CONFIG_FILE = REPO / "dinov2" / "configs" / "train" / "vits14-quickstart.yaml"
TRAINER = REPO / "dinov2" / "train" / "train.py"
FINISHED = "quickstart.json"

# Enough to go through every part of the trainer, too little to learn anything.
SHORT_RUN = ["train.OFFICIAL_EPOCH_LENGTH=1", "train.batch_size_per_gpu=2"]


class TrainingFailedError(UserError):
    """The trainer ended with an error; it has said which."""


@dataclass(frozen=True)
class Training:
    """A finished training.

    Attributes:
        folder: Output directory of the trainer.
        cfg: Resolved config it ran with.
        teacher: The teacher it exported last.
        seconds: Wall time.
        reused: Whether it was finished before.
    """

    folder: Path
    cfg: DictConfig
    teacher: Path
    seconds: float
    reused: bool

    @property
    def metrics(self) -> Path:
        """The JSON lines with losses and times."""
        return self.folder / "training_metrics.json"


def available_cores() -> int:
    """Return how many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_processes() -> int:
    """Return one process per GPU, or without a GPU two, which share the cores."""
    return torch.cuda.device_count() or 2


def config_overrides(tiles: TileSet, weights: Path, *, short: bool, extra: list[str]) -> list[str]:
    """Return what the command line adds to the quickstart's recipe; later entries win."""
    return [
        f"train.dataset_path={tiles.dataset_string}",
        f"student.pretrained_weights={weights}",
        *(SHORT_RUN if short else []),
        *extra,
    ]


def train(
    output_dir: Path, overrides: list[str], *, seed: int, processes: int, fresh: bool = False
) -> Training:
    """Train with one seed, or take the finished training with exactly these settings.

    Every combination of settings has a folder of its own under ``output_dir``. A training that was
    interrupted goes on from its last checkpoint.

    Args:
        output_dir: Where the folder is made.
        overrides: ``key=value`` entries of :func:`config_overrides`.
        seed: ``train.seed``.
        processes: Number of torchrun processes.
        fresh: Remove what an earlier call with these settings left.

    Raises:
        TrainingFailedError: The trainer failed.
    """
    overrides = [*overrides, f"train.seed={seed}"]
    cfg = resolve_config(str(CONFIG_FILE), overrides)
    settings = f"{OmegaConf.to_yaml(cfg, sort_keys=True)}\n{processes}"
    folder = output_dir / f"training-seed{seed}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}"
    if fresh:
        shutil.rmtree(folder, ignore_errors=True)
    teacher = folder / "eval" / f"training_{total_iterations(cfg) - 1}" / "teacher_checkpoint.pth"
    finished = folder / FINISHED
    if finished.is_file() and teacher.is_file():
        return Training(folder, cfg, teacher, json.loads(finished.read_text("utf-8"))["seconds"], reused=True)

    start = time.perf_counter()
    run_trainer(folder, overrides, processes=processes)
    seconds = time.perf_counter() - start
    finished.write_text(json.dumps({"seconds": round(seconds, 1), "processes": processes}), "utf-8")
    return Training(folder, cfg, teacher, seconds, reused=False)


def run_trainer(folder: Path, overrides: list[str], *, processes: int) -> None:
    """Start torchrun, show its command and wait for it."""
    command = [
        str(Path(sys.executable).with_name("torchrun")),
        "--standalone",
        f"--nproc-per-node={processes}",
        str(TRAINER.relative_to(REPO)),
        "--config-file",
        str(CONFIG_FILE.relative_to(REPO)),
        "--output-dir",
        str(folder),
        *overrides,
    ]
    threads = str(max(1, available_cores() // processes))
    environment = {"OMP_NUM_THREADS": threads, **os.environ, "PYTHONPATH": str(REPO)}
    print(f"$ OMP_NUM_THREADS={environment['OMP_NUM_THREADS']} {shlex.join(command)}", flush=True)
    code = subprocess.run(command, cwd=REPO, env=environment, check=False).returncode
    if code:
        raise TrainingFailedError(
            f"the training ended with exit status {code}; its messages are above and in {folder / 'logs'}"
        )
