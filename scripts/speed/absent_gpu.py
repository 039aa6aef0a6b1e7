"""Lets Inductor make kernels for a GPU that is not there, to count what they move; none can be run.

An H100's properties are stated where PyTorch and Triton would ask a driver. Written for PyTorch 2.13.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import scheduler
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule
from triton.backends.compiler import GPUTarget

GPU = torch.device("cuda", 0)
H100 = SimpleNamespace(
    name="H100",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 * 2**30,
    max_threads_per_multi_processor=2048,
    warp_size=32,
    regs_per_multiprocessor=65536,
    shared_memory_per_block_optin=232448,
    L2_cache_size=50 * 2**20,
)
DRIVER = SimpleNamespace(
    get_current_target=lambda: GPUTarget("cuda", 90, 32),
    get_current_device=lambda: 0,
    get_active_torch_device=lambda: GPU,
)


# What stands in for what, where there is no driver to ask.
STAND_INS: list[tuple[Any, dict[str, Any]]] = [
    (
        torch.cuda,
        {
            "is_available": lambda: True,
            "current_device": lambda: 0,
            "get_device_properties": lambda device=None: H100,
            "get_rng_state": lambda device=None: torch.empty(0, dtype=torch.uint8),
            "set_rng_state": lambda state, device=None: None,
            "_exchange_device": lambda index: 0,
            "_maybe_exchange_device": lambda index: 0,
        },
    ),
    (CudaInterface, {"get_device_properties": staticmethod(lambda device=None: H100)}),
    (triton.runtime.driver, {"_active": DRIVER}),
    (scheduler, {"has_triton": lambda: True}),
]


@contextmanager
def absent_gpu() -> Iterator[None]:
    """Let a GPU seem to be there inside the ``with``; where there is one, change nothing."""
    with ExitStack() as stack:
        if not torch.cuda.is_available():
            for where, others in STAND_INS:
                stack.enter_context(mock.patch.multiple(where, **others))
        yield


def move_to_gpu(graph: GraphModule) -> list[Any]:
    """Make a graph that was traced on a CPU one of a GPU; return its inputs, which hold no values."""
    for node in graph.graph.nodes:
        if "val" in node.meta:
            node.meta["val"] = _on_gpu(node.meta["val"])
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": GPU}
    return [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]


def _on_gpu(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(map(_on_gpu, value))
    if not isinstance(value, FakeTensor):
        return value
    with value.fake_mode:
        return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=GPU)
