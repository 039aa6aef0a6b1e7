"""Counts what compiled functions read and write, by the kernels that the compiler makes of them for a GPU.

    counter = CompiledBytes()
    monkeypatch.setattr("dinov2.loss.targets.compiled", counter.compiled)

Counted is what each call's kernels read and write at least, as Inductor counts it: every tensor once a
kernel, whatever a cache may hold. Products and attention, which are others' kernels, are not counted. No GPU
is needed and nothing is computed: arguments are on the CPU, results are memory that nobody has written.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.graph import GraphLowering
from torch.fx import GraphModule
from torch.utils._python_dispatch import _disable_current_modes

from dinov2.compiled import prepare_compiler
from scripts.speed.absent_gpu import absent_gpu, move_to_gpu


class CompiledBytes:
    """Stands in for ``dinov2.compiled.compiled``; ``bytes`` is the sum over all calls so far."""

    def __init__(self) -> None:
        self.bytes = 0

    def compiled(self, function: Callable) -> Callable:
        """Return a function whose calls count what ``function``, compiled, would move."""
        prepare_compiler()
        counted = torch.compile(
            function, backend=partial(compile_fx, inner_compile=self._kernels), dynamic=False
        )

        def call(*arguments: Any) -> Any:
            with _disable_current_modes():  # what counts operators would be compiled, too
                return counted(*arguments)

        return call

    def _kernels(self, graph: GraphModule, inputs: Sequence[Any], **options: Any) -> Callable:
        (results,) = graph.graph.find_nodes(op="output")[0].args
        values = [None if node is None else node.meta["val"] for node in results]
        with absent_gpu():
            moved = _moved(graph, move_to_gpu(graph), options)

        def run(arguments: list[Any]) -> list[Any]:
            self.bytes += moved
            arguments.clear()
            return [_like(value) for value in values]

        run._boxed_call = True
        return run


class _Counted(BaseException):
    """Ends a compilation whose kernels are known; Inductor wraps what is an Exception."""


def _moved(graph: GraphModule, inputs: Sequence[Any], options: dict[str, Any]) -> int:
    """Return the bytes that a graph's kernels move in a call."""

    def count(lowered: GraphLowering) -> None:
        lowered.codegen()
        nodes = lowered.scheduler.nodes
        raise _Counted(sum(node.get_read_write_buffers_sizes() for node in nodes if not node.is_extern()))

    with (
        mock.patch.object(GraphLowering, "compile_to_module", count),
        torch._inductor.config.patch(fx_graph_cache=False),
    ):
        try:
            compile_fx_inner(graph, inputs, **options)
        except _Counted as counted:
            return counted.args[0]
    return 0  # a graph without operators


def _like(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty(value.shape, dtype=value.dtype, device=value.device)
