import pytest
import torch

from dinov2.errors import ConfigError
from dinov2.utils.device import resolve_device
from tests.distributed.launch import torchrun_variables


def set_launcher(monkeypatch, rank):
    for name, value in torchrun_variables(rank=rank, world_size=2, port=29500).items():
        monkeypatch.setenv(name, value)


def test_cpu_is_always_available():
    assert resolve_device("cpu") == torch.device("cpu")


def test_auto_takes_the_cpu_where_there_is_no_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device() == torch.device("cpu")


def test_asking_for_an_absent_cuda_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="PyTorch sees no CUDA device"):
        resolve_device("cuda")


def test_an_unknown_name_is_an_error():
    with pytest.raises(ConfigError, match='"cudda" is not known .did you mean "cuda"'):
        resolve_device("cudda")


@pytest.mark.parametrize("rank", [0, 1])
def test_each_process_of_a_machine_has_its_own_cuda_device(monkeypatch, rank):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    set_launcher(monkeypatch, rank)
    assert resolve_device() == torch.device("cuda", rank)


def test_more_processes_than_cuda_devices_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    set_launcher(monkeypatch, 1)
    with pytest.raises(ConfigError, match="local rank 1 needs .* but this machine has 1"):
        resolve_device()
