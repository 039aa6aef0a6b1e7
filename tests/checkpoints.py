"""Looking into, and spoiling, the checkpoints that runs leave."""

import json
from pathlib import Path

from dinov2.fsdp import read_checkpoint


def read_state(folder: Path) -> dict:
    """Everything in a checkpoint folder, verified, as whole tensors on the CPU."""
    return read_checkpoint(folder)


def iteration_of(folder: Path) -> int:
    return json.loads((folder / "manifest.json").read_text())["iteration"]


def damage(folder: Path, name: str = "__0_0.distcp") -> None:
    """Change one byte in the middle of a file of a checkpoint."""
    path = folder / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
