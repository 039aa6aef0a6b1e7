"""A torchrun that starts its processes again keeps the store in which the dead have left their addresses."""

import os
import subprocess
import sys
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

JOIN = """
import sys
from datetime import timedelta
import torch
from dinov2 import distributed
distributed.enable(device="cpu", timeout=timedelta(seconds=60))
total = torch.ones(1)
distributed.all_reduce_sum_(total)
print(int(total), flush=True)
sys.stdin.read()
"""


def start(port, rank, attempt):
    environment = {
        **os.environ,
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_WORLD_SIZE": "1",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": str(attempt),
        "TORCHELASTIC_RUN_ID": "test",
    }
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", JOIN], env=environment, **pipes)


@pytest.mark.slow
def test_processes_that_start_again_do_not_wait_for_the_dead():
    store = dist.TCPStore("localhost", 0, None, True, timedelta(seconds=60), wait_for_workers=False)
    processes = [start(store.port, rank, 0) for rank in range(2)]
    assert [process.stdout.readline().strip() for process in processes] == ["2", "2"]
    for process in processes:
        process.kill()
        process.communicate()
    # The second process looks for the first one's address long before that exists.
    late = start(store.port, 1, 1)
    time.sleep(15)
    assert late.poll() is None
    processes = [late, start(store.port, 0, 1)]
    found = [process.communicate(timeout=120)[0].strip() for process in processes]
    assert found == ["2", "2"]
