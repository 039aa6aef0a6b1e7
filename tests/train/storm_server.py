"""Starts runs by forking, so that a start does not cost the seconds that importing torch takes.

For every line on the standard input it starts a run of so many processes, prints their ids, waits for them
and prints their exit statuses. Usage: storm_server.py, then the options of the trainer
"""

import json
import os
import sys

import torch

from dinov2 import cli
from dinov2.train.train import get_args_parser, main
from tests.distributed.launch import free_port, torchrun_variables


def start(processes: int, words: list[str]) -> list[int]:
    port, pids = free_port(), []
    for rank in range(processes):
        pid = os.fork()
        if pid == 0:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(2, 1)
            if processes > 1:
                os.environ.update(torchrun_variables(rank, processes, port))
            torch.set_num_threads(1)
            cli.run(main, get_args_parser().parse_args(words))
            sys.exit(0)
        pids.append(pid)
    return pids


if __name__ == "__main__":
    for line in sys.stdin:
        pids = start(int(line), sys.argv[1:])
        print(json.dumps(pids), flush=True)
        print(json.dumps([os.waitpid(pid, 0)[1] for pid in pids]), flush=True)
