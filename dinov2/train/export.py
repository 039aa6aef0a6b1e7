"""The files a run leaves for evaluation and for continuing: teacher, student and their heads."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinov2 import distributed
from dinov2.errors import OutputError
from dinov2.fsdp.files import write_atomically
from dinov2.fsdp.state import gather
from dinov2.models.checkpoint_names import CENTERS, HEADS, checkpoint_name
from dinov2.train.lora import plain_state_dict


def export_networks(
    student: nn.ModuleDict, teacher: nn.ModuleDict, folder: Path, *, centers: dict[str, Tensor] | None = None
) -> None:
    """Write ``{teacher,student}_checkpoint.pth`` and one file per network and head, from rank 0.

    All ranks must call, and all learn how it ended. Tensors are whole and on the CPU. The layouts are those
    of DINOv2 and its forks: ``{"teacher": {"backbone.*", "dino_head.*"}}`` and ``{"teacher_dino_head":
    {...}}``, likewise for the student and, where it is separate, the iBOT head.

    Args:
        student: submodules by name.
        teacher: submodules by name.
        folder: created if need be, e.g. ``<output_dir>/eval/training_9999``.
        centers: running centres of the losses, without which a run cannot be continued from the export
            exactly; written to a file of their own.

    Raises:
        OutputError: the disk is full or the folder cannot be written; on all ranks, after the last file.
    """
    problems = []
    for network, modules in (("teacher", teacher), ("student", student)):
        problems += _save({network: plain_state_dict(modules)}, folder / checkpoint_name(network))
        for head in HEADS:
            if head in modules:
                name = f"{network}_{head}"
                problems += _save({name: modules[head].state_dict()}, folder / checkpoint_name(name))
    if centers:
        problems += _save(centers, folder / checkpoint_name(CENTERS))
    problem = distributed.broadcast_object(problems[0] if problems else "")
    if problem:
        raise OutputError(problem)


def _save(content: dict[str, Any], path: Path) -> list[str]:
    """Write a file from rank 0 and return what went wrong there: no rank may leave the others gathering."""
    whole = gather(content, path.stem)
    if distributed.is_main_process():
        try:
            write_atomically(path, partial(torch.save, whole))
        except OutputError as error:
            return [str(error)]
    return []
