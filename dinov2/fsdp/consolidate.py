"""Turns a checkpoint folder into the one file that older programs read.

python -m dinov2.fsdp.consolidate results/run1/model_final model_final.rank_0.pth
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dinov2 import cli
from dinov2.fsdp import files
from dinov2.fsdp.reading import read_checkpoint
from dinov2.fsdp.state import numbered_optimizer_state


def one_file_state(folder: str | Path) -> dict[str, Any]:
    """Return ``model``, ``optimizer`` with numbered parameters, ``iteration`` and what else there is.

    Raises:
        WeightsError: the folder is damaged, or no checkpoint.
    """
    state = read_checkpoint(folder)
    return {
        name: numbered_optimizer_state(value) if _is_optimizer(value) else value
        for name, value in state.items()
    }


def consolidate(folder: str | Path, path: str | Path) -> None:
    """Write a checkpoint folder as one file, which appears as a whole.

    Raises:
        WeightsError: the folder is damaged, or no checkpoint.
        OutputError: the file can not be written.
    """
    state = one_file_state(folder)
    files.write_atomically(Path(path), lambda file: torch.save(state, file))


def _is_optimizer(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == {"state", "param_groups"}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser("consolidate", description="Write a checkpoint folder as one file.")
    parser.add_argument("folder", help="checkpoint, such as results/run1/model_final")
    parser.add_argument("file", help="to write, such as model_final.rank_0.pth")
    parsed = parser.parse_args(arguments)
    consolidate(parsed.folder, parsed.file)
    cli.say(f"wrote {parsed.file}")


if __name__ == "__main__":
    cli.run(main)
