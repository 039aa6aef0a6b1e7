"""Trains as the command line does and writes down what happens in every step; run by torchrun or called.

Usage: accumulation_worker.py RECORD_FOLDER STOP_BEFORE, then the options of the trainer
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from dinov2 import distributed
from dinov2.data.unreadable import Draw
from dinov2.train import get_args_parser, main
from dinov2.train import input as train_input
from dinov2.train import loop as trainer


class Recorded(train_input.ReproducibleDraws):
    """Appends (position, index, sum of the first crop) of every sample to a file of its stream."""

    folder: Path

    def __getitem__(self, key: tuple[int, int]) -> Draw:
        drawn = super().__getitem__(key)
        first = drawn.sample[0]["global_crops"][0]
        with (self.folder / f"stream_{self.rank}.txt").open("a") as file:
            file.write(json.dumps([*key, float(first.double().sum())]) + "\n")
        return drawn


class Stop(BaseException):
    """Ends a run in the middle, like a process that is killed."""


def train(record_folder: str, stop_before: str, *options: str) -> None:
    """Train; ``stop_before`` so many steps of this process the run breaks off, with 0 it does not."""
    Recorded.folder = Path(record_folder)
    Recorded.folder.mkdir(parents=True, exist_ok=True)
    steps: list[dict[str, Any]] = []
    models: list[torch.nn.Module] = []
    real_step, real_draws = trainer.train_step, train_input.ReproducibleDraws

    def recording_step(model, optimizer, micro_batches, *args, **settings):
        if len(steps) == int(stop_before) > 0:
            raise Stop
        result = real_step(model, optimizer, micro_batches, *args, **settings)
        masks = [images["collated_masks"] for images in micro_batches]
        steps.append({"masks": masks, "losses": result.losses, "grad_norms": result.grad_norms})
        models[:] = [model]
        return result

    trainer.train_step, train_input.ReproducibleDraws = recording_step, Recorded
    try:
        main(get_args_parser().parse_args(options))
    except Stop:
        pass
    finally:
        trainer.train_step, train_input.ReproducibleDraws = real_step, real_draws
    rank = distributed.get_global_rank()
    torch.save(steps, Recorded.folder / f"steps_{rank}.pt")
    state = {name: whole(tensor) for name, tensor in models[0].state_dict().items()}
    if rank == 0:
        torch.save(state, Recorded.folder / "state.pt")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


if __name__ == "__main__":
    train(*sys.argv[1:])
