"""The process group with real launchers, and everything without one."""

import builtins
import os
import subprocess
import sys
import textwrap
from datetime import timedelta

import pytest
import torch

from dinov2 import distributed
from dinov2.distributed.environment import TORCHRUN_VARIABLES
from dinov2.errors import ConfigError
from tests.conftest import REPO
from tests.distributed.launch import free_port, torchrun_variables

WORKER = """
    import builtins, sys, torch
    from dinov2 import distributed as d
    device, printer = sys.argv[1], builtins.print
    d.enable(device=device, overwrite=True)
    d.enable(device=device, overwrite=True)  # a second call is harmless
    assert builtins.print is printer
    rank, size = d.get_global_rank(), d.get_global_size()
    assert (d.get_local_rank(), d.get_local_size(), d.is_main_process()) == (rank, size, rank == 0)
    value = torch.tensor([rank + 1, 1 - rank], device=d.collective_device())
    total, largest = d.all_reduce_sum_(value.clone()).tolist(), d.all_reduce_max_(value.clone()).tolist()
    word = d.broadcast_object({"from": rank}, src=size - 1)
    assert d.all_gather_objects({"from": rank}) == [{"from": other} for other in range(size)]
    d.barrier()
    print(f"rank {rank} of {size}: group={d.is_enabled()} sum={total} max={largest} {word}\\n", end="")
"""


@pytest.fixture
def clean_environment(monkeypatch):
    for name in list(os.environ):
        if name in TORCHRUN_VARIABLES or name.startswith("SLURM_"):
            monkeypatch.delenv(name)
    return monkeypatch


@pytest.fixture
def worker(tmp_path):
    path = tmp_path / "worker.py"
    path.write_text(textwrap.dedent(WORKER))
    return path


def environment(**extra):
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in TORCHRUN_VARIABLES and not name.startswith("SLURM_")
    }
    return kept | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"} | extra


def torchrun(worker, processes, device="cpu", **extra):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*command, f"--nproc-per-node={processes}", str(worker), device],
        env=environment(**extra),
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow
def test_two_processes_under_torchrun_even_inside_a_slurm_allocation(worker):
    result = torchrun(worker, 2, SLURM_JOB_ID="1", SLURM_NTASKS="8", SLURM_PROCID="0")
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("rank")]  # gloo may speak, too
    assert sorted(lines) == [
        "rank 0 of 2: group=True sum=[3, 1] max=[2, 1] {'from': 1}",
        "rank 1 of 2: group=True sum=[3, 1] max=[2, 1] {'from': 1}",
    ]
    assert "destroy_process_group" not in result.stderr  # PyTorch's complaint about groups left open


@pytest.mark.slow
def test_one_process_under_torchrun_makes_a_group(worker):
    result = torchrun(worker, 1)
    assert "rank 0 of 1: group=True sum=[1, 1]" in result.stdout, result.stderr


@pytest.mark.slow
def test_two_slurm_tasks(worker):
    slurm = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "MASTER_PORT": str(free_port()),
    }
    tasks = [
        subprocess.Popen(
            [sys.executable, str(worker), "cpu"],
            env=environment(**slurm, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank)),
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [task.communicate(timeout=120)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0]
    assert all(f"rank {rank} of 2" in output for rank, output in enumerate(outputs))


def test_without_a_launcher_there_is_no_group_and_every_helper_works(clean_environment):
    printer = builtins.print
    distributed.enable()
    assert not distributed.is_enabled()
    assert (distributed.get_global_rank(), distributed.get_global_size()) == (0, 1)
    assert (distributed.get_local_rank(), distributed.get_local_size()) == (0, 1)
    assert distributed.is_main_process()
    assert builtins.print is printer
    tensor = torch.tensor([1.5, -2.0])
    assert distributed.all_reduce_sum_(tensor) is tensor
    assert distributed.all_reduce_max_(tensor) is tensor
    assert tensor.tolist() == [1.5, -2.0]
    assert distributed.broadcast_object("x") == "x"
    assert distributed.all_gather_objects("x") == ["x"]
    assert distributed.collective_device().type == "cpu"
    distributed.barrier()
    distributed.disable()


def test_a_set_variable_is_replaced_only_when_allowed(clean_environment):
    slurm = {"SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "a", "SLURM_NTASKS": "2"}
    for name, value in (slurm | {"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "RANK": "0"}).items():
        clean_environment.setenv(name, value)
    with pytest.raises(ConfigError, match="RANK is '0' but the launcher gives '1'"):
        distributed.enable(device="cpu")
    assert "MASTER_ADDR" not in os.environ  # nothing is half exported


def test_a_missing_peer_ends_in_an_error_after_the_timeout(clean_environment):
    for name, value in torchrun_variables(rank=0, world_size=2, port=free_port()).items():
        clean_environment.setenv(name, value)
    with pytest.raises(torch.distributed.DistError):
        distributed.enable(device="cpu", timeout=timedelta(seconds=1))
    assert not distributed.is_enabled()


@pytest.mark.gpu
def test_nccl_group_of_one(worker):
    result = torchrun(worker, 1, device="cuda")
    assert "rank 0 of 1: group=True" in result.stdout, result.stderr
