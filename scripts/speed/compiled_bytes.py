"""Counts what compiled functions read and write, by the kernels that the compiler makes of them.

    counter = CompiledBytes()
    monkeypatch.setattr("dinov2.loss.targets.compiled", counter.compiled)

Counted is what each call's kernels read and write at least, as Inductor counts it: every tensor once a
kernel, whatever a cache may hold. Products and attention, which are others' kernels, are not counted. The
kernels are those for the device of the arguments; those for a CPU are fused a little less than those for a
GPU. Nothing is computed: results are memory that nobody has written.
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._inductor import metrics
from torch._inductor.compile_fx import compile_fx, compile_fx_inner, inductor_metrics_log
from torch.fx import GraphModule
from torch.utils._python_dispatch import _disable_current_modes

from dinov2.compiled import prepare_compiler


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
        level = inductor_metrics_log.level
        metrics.nodes_num_elem.clear()
        inductor_metrics_log.setLevel(logging.INFO)  # else nothing is counted
        try:
            with torch._inductor.config.patch(fx_graph_cache=False):
                compile_fx_inner(graph, inputs, **options)
        finally:
            inductor_metrics_log.setLevel(level)
        # In units of four bytes, whatever is moved.
        moved = sum(4 * number for node, number in metrics.nodes_num_elem if not node.is_extern())
        metrics.nodes_num_elem.clear()

        def run(arguments: list[Any]) -> list[Any]:
            self.bytes += moved
            arguments.clear()
            return [_like(value) for value in values]

        run._boxed_call = True
        return run


def _like(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty(value.shape, dtype=value.dtype, device=value.device)
