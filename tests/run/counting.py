"""A module with a `main` that stops like the trainer: handlers of its own, saves on all processes, raises.

It counts to `steps` (in `opts`), and goes on from the number that it saved: for as many steps as `restarted`
says, if it does. Also a script, for torchrun.
"""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

from dinov2 import cli, distributed
from dinov2.errors import Interrupted
from dinov2.run.submit import Task

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
STEP_SECONDS = 0.1


def main(args: argparse.Namespace) -> int:
    received: list[int] = []
    previous = {number: signal.signal(number, lambda n, _: received.append(n)) for number in SIGNALS}
    try:
        return count(args, received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def count(args: argparse.Namespace, received: list[int]) -> int:
    distributed.enable(device="cpu")
    rank = distributed.get_global_rank()
    folder = Path(args.output_dir)
    folder.mkdir(exist_ok=True, parents=True)
    values = dict(word.split("=") for word in args.opts)
    state = folder / "state.json"
    done = (
        json.loads(state.read_text())["done"] if state.exists() and not getattr(args, "no_resume", 0) else 0
    )
    distributed.barrier()
    with (folder / f"starts_{rank}.jsonl").open("a") as file:
        environment = {name: os.environ.get(name) for name in ("RANK", "SLURM_PROCID", "SITE_VARIABLE")}
        start = {"from": done, "size": distributed.get_global_size(), "opts": args.opts, **environment}
        file.write(json.dumps(start) + "\n")
    last = done + int(values["restarted"]) if done and "restarted" in values else int(values["steps"])
    while done < last:
        time.sleep(STEP_SECONDS)
        done += 1
        number = int(distributed.all_reduce_max_(torch.tensor(float(max(received, default=0)))).item())
        if rank == 0:
            aside = state.with_suffix(".part")
            aside.write_text(json.dumps({"done": done}))
            aside.replace(state)
        distributed.barrier()
        if number:
            name = signal.Signals(number).name
            raise Interrupted(f"{name} received, saved after step {done}, start again to go on", number)
    return done


class Counter(Task):
    module = "tests.run.counting"


if __name__ == "__main__":
    cli.run(main, argparse.Namespace(output_dir=sys.argv[1], opts=sys.argv[2:]))
