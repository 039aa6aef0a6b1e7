"""Checkpoints of the linear evaluation, with the entries model, optimizer, scheduler and iteration."""

import logging
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dinov2 import distributed
from dinov2.errors import OutputError, WeightsError
from dinov2.eval.linear_classifiers import unwrapped

logger = logging.getLogger("dinov2")

RUNNING_NAME = "running_checkpoint_linear_eval"


@dataclass(frozen=True)
class LinearCheckpointer:
    """Saves and restores what the linear evaluation trains.

    The file ``last_checkpoint`` in ``output_dir`` holds the name of the newest checkpoint.
    """

    linear_classifiers: nn.Module
    optimizer: Optimizer
    scheduler: LRScheduler
    output_dir: str

    def save(self, name: str, iteration: int) -> None:
        """Write ``<name>.pth`` after ``iteration`` (counted from 0); only the main process writes."""
        if not distributed.is_main_process():
            return
        folder = Path(self.output_dir)
        state = {
            "model": unwrapped(self.linear_classifiers).state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "iteration": iteration,
        }
        try:
            # Written aside and renamed, so that a run stopped here leaves the previous file whole.
            aside = folder / f".{name}.pth.part"
            torch.save(state, aside)
            aside.replace(folder / f"{name}.pth")
            (folder / "last_checkpoint").write_text(f"{name}.pth")
        except OSError as error:
            raise OutputError(
                f"the checkpoint {folder / name}.pth cannot be written ({error.strerror}): choose another "
                "--output-dir"
            ) from error

    def restore(self, classifier_fpath: str | None, resume: bool) -> int:
        """Restore the newest checkpoint if ``resume``, else ``classifier_fpath``; return the next iteration.

        Raises:
            WeightsError: The file cannot be read, or belongs to other classifiers.
        """
        tag = Path(self.output_dir) / "last_checkpoint"
        if resume and tag.exists():
            path = tag.with_name(tag.read_text().strip())
        elif classifier_fpath:
            path = Path(classifier_fpath)
        else:
            return 0
        state = _read(path)
        try:
            unwrapped(self.linear_classifiers).load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
        except (KeyError, RuntimeError, ValueError) as error:
            raise WeightsError(
                f"the checkpoint {path} belongs to other classifiers (another backbone, grid of learning "
                "rates or number of classes): use the options it was made with, or --no-resume"
            ) from error
        logger.info("continuing after iteration %d of %s", state["iteration"], path)
        return state["iteration"] + 1


def _read(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise WeightsError(
            f"the checkpoint {path} of linear classifiers cannot be read ({type(error).__name__}): name "
            "another with --classifier-fpath, or start afresh with --no-resume"
        ) from error
