"""Times how long saving a checkpoint holds the training up, and how long it takes in all.

Usage: python scripts/bench_checkpoint.py [--arch vit_small] [--prototypes 65536] [--saves 6] [--idle]
       torchrun --standalone --nproc-per-node=2 scripts/bench_checkpoint.py

The state is that of a run: student, teacher, heads and the moments of AdamW. While a save is written the
process computes, as training does, for as long as the save before took; with --idle it does nothing. Printed
are, per save, the wait, the time until the checkpoint is complete, and their ratio. The first save makes the
memory of the copy, too.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from dinov2 import cli, distributed
from dinov2.configs import resolve_config
from dinov2.fsdp.checkpointer import FSDPCheckpointer
from dinov2.train.optimizer import build_optimizer
from dinov2.train.ssl_meta_arch import SSLMetaArch


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="vit_small", help="architecture (default: %(default)s)")
    parser.add_argument("--prototypes", type=int, default=65536, help="of each head (default: %(default)s)")
    parser.add_argument(
        "--saves", type=int, default=6, help="how many after the first (default: %(default)s)"
    )
    parser.add_argument("--idle", action="store_true", help="compute nothing while a save is written")
    parser.add_argument("--dir", default=None, help="where to write (default: a temporary folder)")
    return parser.parse_args()


def compute(seconds: float) -> None:
    """Keep this process's cores as busy as a step would."""
    operand = torch.randn(512, 512)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        operand = torch.nn.functional.normalize(operand @ operand)


def main() -> None:
    """Print one line per save and the ratio of the medians."""
    options = parse_arguments()
    distributed.enable()
    overrides = [
        f"student.arch={options.arch}",
        "student.patch_size=14",
        "crops.local_crops_size=98",
        f"dino.head_n_prototypes={options.prototypes}",
        "train.device=cpu",
        "compute_precision.student.backbone.sharding_strategy=NO_SHARD",
    ]
    cfg = resolve_config("", overrides)
    model = SSLMetaArch(cfg)
    model.prepare_for_distributed_training()
    optimizer = build_optimizer(cfg, model.get_params_groups())
    for parameter in model.student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        checkpointer = FSDPCheckpointer(model, folder, asynchronous=True, max_to_keep=1, optimizer=optimizer)
        shares, last = [], 0.0
        for number in range(options.saves + 1):
            checkpointer.save(f"model_{number:07d}", iteration=number)
            if not options.idle:
                compute(last)
            outcome = checkpointer.wait(must_succeed=True)
            last = outcome.seconds
            shares.append(outcome.stalled_seconds / outcome.seconds)
            if distributed.is_main_process():
                size = sum(path.stat().st_size for path in Path(folder, outcome.name).iterdir()) / 1e6
                cli.say(
                    f"save {number}: {size:.0f} MB, waited {outcome.stalled_seconds:.2f} s of "
                    f"{outcome.seconds:.1f} s ({shares[-1]:.1%})"
                )
            time.sleep(1)
        checkpointer.close()
    if distributed.is_main_process():
        cli.say(f"median after the first: {statistics.median(shares[1:]):.1%}")


if __name__ == "__main__":
    main()
