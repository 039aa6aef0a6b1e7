"""Counts what activation checkpointing keeps for the backward pass, and times a forward and backward pass.

Usage: python scripts/bench_recompute.py [--arch vit_small] [--images 2] [--rounds 3] [--bf16]

Kept are the bytes of all tensors alive after the forward pass of the backbone that were not before, per image
of 2 global crops of 224 px and 8 local ones of 98 px at patch 14. The modes take turns in one process; ratios
are those of medians.
"""

import argparse
import statistics
import time

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dinov2 import cli
from dinov2.layers.block import Block
from dinov2.layers.recompute import MODES
from dinov2.models import vision_transformer

CROPS = ((2, 224), (8, 98))
PATCH = 14


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="vit_small", help="architecture (default: %(default)s)")
    parser.add_argument("--images", type=int, default=2, help="images per batch (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="times that each mode is timed")
    parser.add_argument("--bf16", action="store_true", help="run under autocast in bfloat16")
    return parser.parse_args()


class Made(TorchDispatchMode):
    """Notes every storage that operations return, without keeping it alive."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.storages[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        return results

    def alive(self, besides: set[int]) -> int:
        """Return the bytes of those that are still alive; ``besides`` are addresses not to count."""
        return sum(
            size
            for pointer, (reference, size) in self.storages.items()
            if pointer not in besides and not reference.expired()
        )


def main() -> None:
    """Print one line per mode."""
    options = parse_arguments()
    torch.manual_seed(0)
    model = getattr(vision_transformer, options.arch)(patch_size=PATCH, init_values=1e-5, block_chunks=0)
    crops = [torch.randn(count * options.images, 3, side, side) for count, side in CROPS]
    given = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *crops)}

    def forward() -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=options.bf16):
            outputs = model(crops, masks=None, is_training=True)
        return sum(part["x_norm_clstoken"].float().square().sum() for part in outputs)

    kept, seconds = {}, {mode: [] for mode in MODES}
    for round_number in range(-1, options.rounds):
        for mode in MODES:
            for block in model.modules():
                if isinstance(block, Block):
                    block.recompute = mode
            if round_number < 0:
                with Made() as made:
                    loss = forward()
                kept[mode] = made.alive(given) / options.images / 2**20
                loss.backward()
                continue
            begin = time.process_time()
            forward().backward()
            seconds[mode].append(time.process_time() - begin)
    medians = {mode: statistics.median(times) for mode, times in seconds.items()}
    for mode in MODES:
        cli.say(
            f"{options.arch} {mode}: {kept[mode]:.1f} MiB per image ({kept[mode] / kept['none']:.2f}), "
            f"CPU time {medians[mode] / medians['none']:.2f}"
        )


if __name__ == "__main__":
    main()
