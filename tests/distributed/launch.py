"""Run a function in several real processes that share a gloo group, for tests all over this folder.

outcome = run_in_processes(function, argument)   # one entry per process, in the order of ranks
run_script("tests/train/worker.py", argument)    # without torchrun, whose own start takes as long as a rank's
"""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as multiprocessing

from dinov2 import distributed
from tests.conftest import REPO


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def torchrun_variables(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
    }


def run_in_processes(function: Callable[..., Any], *arguments: Any, world_size: int = 2) -> list[Any]:
    """Call ``function(*arguments)``, a module-level function, in every process; return what each returned."""
    context = multiprocessing.get_context("spawn")
    outcomes = context.SimpleQueue()
    multiprocessing.spawn(
        _enter, (world_size, free_port(), outcomes, function, arguments), nprocs=world_size, join=True
    )
    return [outcome for _, outcome in sorted((outcomes.get() for _ in range(world_size)), key=lambda o: o[0])]


def run_script(script: str, *arguments: str, world_size: int = 2, seconds: float = 300) -> None:
    """Run a script of this repository in every process of a group, and end all once one of them fails."""
    port, processes = free_port(), []
    with tempfile.TemporaryFile("w+") as said:
        try:
            for rank in range(world_size):
                env = {**os.environ, **torchrun_variables(rank, world_size, port)}
                env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
                command = [sys.executable, str(REPO / script), *arguments]
                processes.append(subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=said))
            deadline = time.monotonic() + seconds
            while any(process.poll() is None for process in processes):
                failed = any(process.returncode for process in processes)
                if failed or time.monotonic() > deadline:
                    break
                time.sleep(0.05)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        said.seek(0)
        assert [process.returncode for process in processes] == [0] * world_size, said.read()[-3000:]


def _enter(
    rank: int, world_size: int, port: int, outcomes: Any, function: Callable[..., Any], arguments: tuple
) -> None:
    os.environ.update(torchrun_variables(rank, world_size, port))
    torch.set_num_threads(1)
    distributed.enable(device="cpu")
    outcomes.put((rank, function(*arguments)))
    distributed.barrier()
    distributed.disable()
