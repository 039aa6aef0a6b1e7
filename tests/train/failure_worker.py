"""The trainer's command line with a dataset that misbehaves, by variables of the environment.

Positions count the samples that a process draws. With ON_RANK only that process misbehaves.

PACE=seconds        every first sample of a batch takes that long
SLEEP="position s"  that sample takes s seconds
POISON=position     that sample's crops are NaN; "position-" means all from there on
FAIL=position       reading that sample raises an error of the program
KILL=position       the process is killed there, unless there is a checkpoint from after a restart
SIGNAL_WORKERS=1    the reading process is sent what Slurm sends to all
"""

import os
import signal
import time
from pathlib import Path

import torch

from dinov2 import cli
from dinov2.train import input as train_input
from dinov2.train import ssl_meta_arch, train

BATCH = 4
VARIABLES = os.environ


class Misbehaving(train_input.ReproducibleDraws):
    output_dir = ""

    def draw(self, key):
        position, _ = key
        drawn = super().draw(key)
        if position % BATCH == 0:
            time.sleep(float(VARIABLES.get("PACE", 0)))
        if self.rank == int(VARIABLES.get("ON_RANK", self.rank)):
            self.misbehave(position, drawn)
        return drawn

    def misbehave(self, position, drawn):
        folder = Path(self.output_dir)
        place, _, seconds = VARIABLES.get("SLEEP", "-1").partition(" ")
        if position == int(place):
            (folder / "sleeping").write_text(str(os.getpid()))
            time.sleep(float(seconds))
        if position == int(VARIABLES.get("FAIL", -1)):
            raise RuntimeError("no such luck")
        if (
            position == BATCH * int(VARIABLES.get("KILL", -1))
            and VARIABLES["TORCHELASTIC_RESTART_COUNT"] == "0"
        ):
            os.kill(os.getpid(), signal.SIGKILL)
        if "SIGNAL_WORKERS" in VARIABLES and position == BATCH:
            (folder / "worker.pid").write_text(str(os.getpid()))
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
                os.kill(os.getpid(), number)
        poison = VARIABLES.get("POISON", "-1")
        from_there_on = poison.endswith("-")
        place = int(poison.removesuffix("-") if from_there_on else poison)
        if position == place or (from_there_on and position >= place):
            for crop in drawn.sample[0]["global_crops"]:
                crop.fill_(float("nan"))


def main(args):
    Misbehaving.output_dir = args.output_dir
    train_input.ReproducibleDraws = Misbehaving
    torch.set_num_threads(1)
    train.main(args)


def poison_gradient(name, tiny, output_dir, *overrides):
    """Train with a module whose gradient is inf where it leaves it."""
    real = ssl_meta_arch.SSLMetaArch.prepare_for_distributed_training

    def prepare(model):
        real(model)

        def poison(module, inputs, output):
            if output.requires_grad:
                output.register_hook(lambda gradient: torch.full_like(gradient, float("inf")))

        model.student.get_submodule(name).register_forward_hook(poison)

    ssl_meta_arch.SSLMetaArch.prepare_for_distributed_training = prepare
    try:
        tiny.start(output_dir, *overrides)
    finally:
        ssl_meta_arch.SSLMetaArch.prepare_for_distributed_training = real


if __name__ == "__main__":
    cli.run(main, train.get_args_parser().parse_args())
