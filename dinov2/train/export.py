"""The files a run leaves for evaluation and for continuing: teacher, student and their heads."""

import os
from pathlib import Path

import torch
from torch import Tensor, nn

from dinov2 import distributed

HEADS = ("dino_head", "ibot_head")


def cpu_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """Return the module's state dict with every tensor on the CPU."""
    return {name: tensor.detach().cpu() for name, tensor in module.state_dict().items()}


def save_atomically(content: dict, path: Path) -> None:
    """Write ``content`` so that ``path`` holds either its old file or the complete new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def export_networks(student: nn.ModuleDict, teacher: nn.ModuleDict, folder: Path) -> None:
    """Write ``{teacher,student}_checkpoint.pth`` and one file per network and head, on rank 0.

    Layouts are those of DINOv2 and its forks: ``{"teacher": {"backbone.*", "dino_head.*"}}`` and
    ``{"teacher_dino_head": {...}}``, likewise for the student.

    Args:
        student, teacher: submodules by name.
        folder: created if need be, e.g. ``<output_dir>/eval/training_9999``.
    """
    if not distributed.is_main_process():
        return
    folder.mkdir(parents=True, exist_ok=True)
    for network, modules in (("teacher", teacher), ("student", student)):
        state = cpu_state_dict(modules)
        save_atomically({network: state}, folder / f"{network}_checkpoint.pth")
        for head in HEADS:
            if head in modules:
                name = f"{network}_{head}"
                save_atomically({name: cpu_state_dict(modules[head])}, folder / f"{name}_checkpoint.pth")
