"""Time of a training step by part, measured in steps of their own.

Parts are entered and left by hooks on the networks and by wrapping methods of the step, while
:func:`instrument` is active; a part inside another does not count for the outer one. On a GPU every boundary
waits for the device, so instrumented steps are slower than others and their sum says nothing; the shares do.
The student's heads include the comparison with the prototypes and what of its gradient is made on the way.
"""

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

OTHER = "other"
TEACHER_BACKBONE, TEACHER_HEADS, TARGETS = "teacher backbone", "teacher heads", "targets (centering)"
STUDENT_BACKBONE, STUDENT_HEADS, LOSSES = "student backbone", "student heads, prototypes", "losses, rest"
BACK_LOSSES, BACK_HEADS, BACK_BACKBONE = "backward: losses", "backward: heads", "backward: backbone"
CLIP, OPTIMIZER, TEACHER_UPDATE = "clipping", "optimizer", "teacher update"
PARTS = (TEACHER_BACKBONE, TEACHER_HEADS, TARGETS, STUDENT_BACKBONE, STUDENT_HEADS, LOSSES, BACK_LOSSES)
PARTS += (BACK_HEADS, BACK_BACKBONE, CLIP, OPTIMIZER, TEACHER_UPDATE, OTHER)


class PartTimer:
    """A stopwatch that is always running for exactly one part.

    Args:
        synchronize: called before each reading of the clock; waits for the device.
        clock: returns seconds.
    """

    def __init__(
        self, synchronize: Callable[[], None] = lambda: None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.synchronize, self.clock = synchronize, clock
        self.seconds: dict[str, float] = defaultdict(float)
        self._stack: list[str] = []
        self._since = 0.0

    def _credit(self) -> None:
        self.synchronize()
        now = self.clock()
        if self._stack:
            self.seconds[self._stack[-1]] += now - self._since
        self._since = now

    def enter(self, part: str) -> None:
        """Begin a part inside the present one."""
        self._credit()
        self._stack.append(part)

    def leave(self) -> None:
        """End the innermost part."""
        self._credit()
        self._stack.pop()

    def switch(self, part: str) -> None:
        """Go on as another part, in place of the innermost one."""
        self._credit()
        self._stack[-1] = part

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time what happens inside the ``with``."""
        self.enter(name)
        try:
            yield
        finally:
            self.leave()


@contextmanager
def instrument(model: nn.Module, optimizer: torch.optim.Optimizer, timer: PartTimer) -> Iterator[None]:
    """Let steps of the project's own ``SSLMetaArch`` report to ``timer`` inside the ``with``."""
    step_module = sys.modules["dinov2.train.step"]
    with ExitStack() as undo:
        for network, backbone, heads in (
            (model.teacher, TEACHER_BACKBONE, TEACHER_HEADS),
            (model.student, STUDENT_BACKBONE, STUDENT_HEADS),
        ):
            for name, module in network.items():
                _time_forward(undo, module, backbone if name == "backbone" else heads, timer)
        _mark_gradients(undo, model.student, timer)
        for owner, name, part in (
            (model, "assign_targets", TARGETS),
            (model, "combine_losses", LOSSES),
            (model, "backprop_loss", BACK_LOSSES),
            (model, "update_teacher", TEACHER_UPDATE),
            (step_module, "clip_gradients", CLIP),
            (optimizer, "step", OPTIMIZER),
        ):
            _replace(undo, owner, name, _timed(getattr(owner, name), part, timer))
        yield


def _timed(function: Callable[..., Any], part: str, timer: PartTimer) -> Callable[..., Any]:
    @wraps(function)
    def timed(*args: Any, **kwargs: Any) -> Any:
        with timer.part(part):
            return function(*args, **kwargs)

    return timed


def _replace(undo: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set an attribute until the end, where the one of the class, or the old one, shows again."""
    own = vars(owner).get(name)
    setattr(owner, name, value)
    undo.callback(delattr, owner, name) if own is None else undo.callback(setattr, owner, name, own)


def _time_forward(undo: ExitStack, module: nn.Module, part: str, timer: PartTimer) -> None:
    undo.callback(module.register_forward_pre_hook(lambda *_: timer.enter(part)).remove)
    undo.callback(module.register_forward_hook(lambda *_: timer.leave()).remove)


def _mark_gradients(undo: ExitStack, student: nn.ModuleDict, timer: PartTimer) -> None:
    """Divide the backward pass where the gradients of the heads' and of the backbone's results are ready."""

    def marker(part: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, outputs: Any) -> None:
            results = [
                leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.requires_grad
            ]
            if results:
                torch.autograd.graph.register_multi_grad_hook(
                    _normed(outputs) or results, lambda _: timer.switch(part)
                )

        return hook

    for name, module in student.items():
        part = BACK_BACKBONE if name == "backbone" else BACK_HEADS
        undo.callback(module.register_forward_hook(marker(part)).remove)


def _normed(outputs: Any) -> list[Tensor]:
    """Return the cls tokens of a backbone's results, which all lead to losses; other entries may not."""
    groups = outputs if isinstance(outputs, (list, tuple)) else [outputs]
    if not all(isinstance(group, dict) for group in groups):
        return []
    return [group["x_norm_clstoken"] for group in groups if group["x_norm_clstoken"].requires_grad]
