"""Blocks recorded as CUDA graphs (``train.cuda_graphs``): the host starts thousands of kernels at once.

A GPU computes a small batch faster than a host can ask for its kernels one by one. What is asked for does not
change from step to step, so it is recorded once and replayed: the blocks forwards, and the same backwards.
A recording works on memory of its own. Inputs are copied in, gradients are copied out; the result is read
where it is, and the next replay overwrites it. Before it is used, it is compared with what it records.

Shapes: T tokens packed, D width.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dinov2 import distributed
from dinov2.compiled import runs_as_written
from dinov2.errors import ConfigError, UserError
from dinov2.layers.autocast import autocast_dtype
from dinov2.layers.block import Block, run_blocks
from dinov2.layers.packing import PackedLayout
from dinov2.layers.stochastic_depth import Subset

logger = logging.getLogger("dinov2")

Planned = Sequence[tuple[Block, Sequence[Subset]]]

# Before blocks are recorded: everything is compiled by then, and the steps have taken what memory they take.
WARM_UP_STEPS = 5
# A recording's memory is its own also while the rest of the step could use it, and pieces are left over; to
# compare it takes what the blocks need once more.
MEMORY_FACTOR = 2.4
# Between replays and blocks, of the norm of the result and of each gradient. Products may add up in another
# order, which in 16 bits grows over the blocks.
LARGEST_DISTANCE = 0.05
COMPARISONS = 2  # the second finds what the first has spoilt


class RecordingError(UserError, RuntimeError):
    """The blocks of a run can not be recorded."""


class Recorder(Protocol):
    """What records and replays functions that use each other's results."""

    def record(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], Any]]:
        """Return what ``function`` returns, and what computes it again into the same memory.

        That may overwrite what functions recorded later return.
        """


class CudaRecorder:
    """Records what is asked of a GPU, all in the same memory."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], Any]]:
        """See :class:`Recorder`; nothing is computed before the first replay."""
        graph = torch.cuda.CUDAGraph()
        # The loader's thread goes on pinning memory meanwhile, which would end a recording of all threads.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = function()
        return result, graph.replay


class _Recording:
    """One recorded pass over blocks.

    Attributes:
        parameters: those that get gradients.
        replays: how often either direction was replayed.
    """

    def __init__(self, recorder: Recorder, planned: Planned, x: Tensor, layout: PackedLayout) -> None:
        of_modules = dict(_parameters_by_module(planned))
        self.parameters = [p for own in of_modules.values() for p in own.values() if p.requires_grad]
        self.replays = 0
        self._x = x.detach().clone().requires_grad_(x.requires_grad)
        self._planned = [(block, [_copied(subset) for subset in subsets]) for block, subsets in planned]
        self._moves = _by_dtype(self._planned)
        self._layout = layout
        self._with_gradients = torch.is_grad_enabled()
        # Autograd would end a recording where it met nodes of the parameters that another stream has made,
        # which live as long as any earlier graph.
        self._stand_ins = {
            module: {name: nn.Parameter(p.detach(), p.requires_grad) for name, p in own.items()}
            for module, own in of_modules.items()
        }
        self._result, self._replay = recorder.record(self._run)
        if self._result.requires_grad:
            self._gradient = torch.empty_like(self._result)
            self._gradients, self._replay_back = recorder.record(self._run_back)

    def _run(self) -> Tensor:
        with _standing_in(self._stand_ins):
            self._with_graph = run_blocks(self._planned, self._x, self._layout)
        return self._with_graph.detach().requires_grad_(self._with_graph.requires_grad)

    def _run_back(self) -> tuple[Tensor | None, ...]:
        learning = [p for own in self._stand_ins.values() for p in own.values() if p.requires_grad]
        wanted = [*([self._x] if self._x.requires_grad else []), *learning]
        return torch.autograd.grad(self._with_graph, wanted, self._gradient, allow_unused=True)

    def __call__(self, planned: Planned, x: Tensor) -> Tensor:
        """Return the packed tokens ``[1, T, D]`` after the blocks."""
        for mine, given in zip(self._moves, _by_dtype(planned), strict=True):
            torch._foreach_copy_(mine, given)
        return _Replay.apply(self, x, *self.parameters)

    def forward(self, x: Tensor) -> Tensor:
        """Replay forwards."""
        with torch.no_grad():
            self._x.copy_(x)
        self._replay()
        self.replays += 1
        if self._result.requires_grad:  # what later layers have kept of the last one is no more
            torch.autograd.graph.increment_version(self._result)
        result = self._result.detach()
        # What follows may learn though these blocks do not; then nobody asks whether this was overwritten.
        return result if self._result.requires_grad or not self._with_gradients else result.clone()

    def backward(self, gradient: Tensor) -> list[Tensor | None]:
        """Replay backwards; return the gradients of the input and of all parameters."""
        self._gradient.copy_(gradient)
        self._replay_back()
        self.replays += 1  # what the pass forwards has left is used up
        found = [gradient for gradient in self._gradients if gradient is not None]
        # The next replay forwards may write where these are, while gradients are still added up.
        copies = [torch.empty_like(gradient) for gradient in found]
        torch._foreach_copy_(copies, found)
        following = iter(copies)
        gradients = [None if gradient is None else next(following) for gradient in self._gradients]
        return gradients if self._x.requires_grad else [None, *gradients]

    def distance(self, planned: Planned, x: Tensor, layout: PackedLayout) -> float | None:
        """Return how far replays are from what the blocks compute, see ``LARGEST_DISTANCE``; may be NaN.

        None if what the blocks compute is itself not finite.
        """
        expected = self._computed(lambda x: run_blocks(planned, x, layout), x)
        lengths = torch.stack(torch._foreach_norm(expected)).clamp_min(torch.finfo(torch.float32).tiny)
        if not lengths.isfinite().all():
            return None
        found = [self._computed(lambda x: self(planned, x), x) for _ in range(COMPARISONS)]
        self.forward(x)  # must leave alone what was returned
        distances = [torch.stack(torch._foreach_norm(torch._foreach_sub(one, expected))) for one in found]
        return (torch.stack(distances) / lengths).max().item()

    def _computed(self, run: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
        """Return the result and, of its norm, all gradients, float32."""
        x = x.detach().requires_grad_(x.requires_grad)
        result = run(x)
        computed = [result.detach().clone()]
        if result.requires_grad:
            wanted = [*([x] if x.requires_grad else []), *self.parameters]
            direction = computed[0] / torch.linalg.vector_norm(computed[0], dtype=torch.float32)
            gradients = torch.autograd.grad(result, wanted, direction.to(result.dtype), allow_unused=True)
            computed += [gradient for gradient in gradients if gradient is not None]
        return [tensor.float() for tensor in computed]


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, recording, x, *parameters):
        ctx.recording = recording
        result = recording.forward(x)
        ctx.replay = recording.replays
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        if ctx.replay != ctx.recording.replays:
            raise RuntimeError(
                "these blocks ran again, or backwards, since the run whose gradients are wanted, and its "
                "values are lost: use train.cuda_graphs=false"
            )
        return None, *ctx.recording.backward(gradient)


class RecordedBlocks:
    """Runs blocks, after a few calls as a recording.

    One recording is kept: of what was asked for several times in a row. Anything else, and everything inside
    of :func:`dinov2.compiled.uncompiled`, runs as it would without; so do all blocks where there is no memory
    for a recording or it computes something else, which is logged. Their modules must stay the same objects.
    Hooks on single blocks are not called by a replay, those on chunks of blocks not at all.

    Args:
        name: of the network.
        warm_up: calls before the recording.
        make_recorder: makes one for each recording.
        has_room: whether there is memory for a recording; None if that is not asked, and its lack or a
            recording that computes something else an error.
    """

    def __init__(
        self,
        name: str,
        warm_up: int = WARM_UP_STEPS,
        make_recorder: Callable[[], Recorder] = CudaRecorder,
        has_room: Callable[[], bool] | None = None,
    ) -> None:
        self._name, self._warm_up = name, warm_up
        self._make_recorder, self._has_room = make_recorder, has_room
        self._off = False
        self._slots: list[tuple[dict[str, nn.Parameter | None], str]] = []  # of all modules' parameters
        self._key: Any = None
        self._calls = 0
        self._recording: _Recording | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Let copies start anew: a recording computes with the parameters of the original."""
        return RecordedBlocks, (self._name, self._warm_up, self._make_recorder, self._has_room)

    def __call__(self, planned: Planned, x: Tensor, layout: PackedLayout) -> Tensor:
        """Return packed tokens ``[1, T, D]`` after blocks with their subsets, see :func:`run_blocks`."""
        if self._off or not planned or runs_as_written():
            return run_blocks(planned, x, layout)
        if not self._slots:  # to walk through all modules takes as long as a replay
            modules = [module for module, _ in _parameters_by_module(planned)]
            self._slots = [(module._parameters, name) for module in modules for name in module._parameters]
        key = self._depends_on(planned, x, layout)
        if key != self._key:
            self._key, self._calls, self._recording = key, 0, None
        self._calls += 1
        if self._recording is None and self._calls > self._warm_up:
            self._recording = self._record(planned, x, layout)
        return run_blocks(planned, x, layout) if self._recording is None else self._recording(planned, x)

    @property
    def is_recorded(self) -> bool:
        """Whether the last calls were, or the next call may be, a replay."""
        return self._recording is not None

    def _depends_on(self, planned: Planned, x: Tensor, layout: PackedLayout) -> Any:
        """Return all that a recording depends on beside its inputs."""
        parameters = [slots[name] for slots, name in self._slots]
        return (
            layout,
            (x.device, x.dtype, x.requires_grad, torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
            autocast_dtype(x.device),
            tuple(subset.layout for _, subsets in planned for subset in subsets),
            tuple((id(p), p.data_ptr(), p.requires_grad) for p in parameters if p is not None),
        )

    def _record(self, planned: Planned, x: Tensor, layout: PackedLayout) -> _Recording | None:
        """Return a recording; None, now and later, if there is no memory or it computes something else.

        None for now if the blocks compute nothing that is finite.

        Raises:
            RecordingError: it can not be made.
        """
        if self._has_room is not None and not self._has_room():
            self._off = True
            return None
        try:
            recording = _Recording(self._make_recorder(), planned, x, layout)
            distance = recording.distance(planned, x, layout)
        except torch.OutOfMemoryError:
            if self._has_room is None:
                raise
            return self._give_up("the memory did not suffice")
        except RuntimeError as error:  # a GPU's random numbers do not come back from that
            raise RecordingError(
                f"the {self._name} could not be recorded as CUDA graphs "
                f"({next(iter(str(error).splitlines()), type(error).__name__)}): use train.cuda_graphs=false"
            ) from error
        if distance is None:  # this step will be skipped
            return None
        if not distance <= LARGEST_DISTANCE:
            if self._has_room is None:
                raise RecordingError(
                    f"the CUDA graphs of the {self._name} compute something else than its blocks (relative "
                    f"error {distance:.1g}): use train.cuda_graphs=false"
                )
            return self._give_up(
                f"replays compute something else than its blocks (relative error {distance:.1g})"
            )
        logger.info("recorded %d blocks of the %s as CUDA graphs", len(planned), self._name)
        return recording

    def _give_up(self, reason: str) -> None:
        self._off = True
        logger.warning("the %s is not recorded as CUDA graphs: %s", self._name, reason)


def records(cfg: DictConfig, device: torch.device, *, compiled: bool) -> bool:
    """Return whether a run records its blocks: ``train.cuda_graphs``, by default where that was tried.

    Args:
        cfg: resolved config.
        device: of the networks.
        compiled: whether blocks are compiled.

    Raises:
        ConfigError: it is asked to, and can not.
    """
    obstacles = {
        "there is no CUDA device": device.type != "cuda",
        "nothing is compiled (train.compile)": not compiled,
        "the blocks are divided over several processes": distributed.get_global_size() > 1,
        "train.activation_checkpointing computes them again": cfg.train.activation_checkpointing != "none",
    }
    found = [obstacle for obstacle, is_there in obstacles.items() if is_there]
    if cfg.train.cuda_graphs and found:
        raise ConfigError(f"train.cuda_graphs is true, but {found[0]}: leave it out")
    if cfg.train.cuda_graphs is not None:
        return cfg.train.cuda_graphs
    return not found and cfg.optim.accumulate_steps == 1 and not cfg.student.lora_rank


def record_blocks(backbones: Mapping[str, nn.Module], *, calls_per_step: int, required: bool) -> None:
    """Let all blocks but the last of each backbone run as CUDA graphs, see :class:`RecordedBlocks`.

    Args:
        backbones: by the name of their network; compiled, on a GPU, not sharded. Those without this package's
            blocks stay as they are.
        calls_per_step: micro-batches of a step.
        required: whether it is an error if one can not be recorded, for its kind or a lack of memory.

    Raises:
        ConfigError: it is, and one has no blocks that can be recorded.
    """
    for name, backbone in backbones.items():
        if hasattr(backbone, "run_blocks"):
            warm_up, has_room = WARM_UP_STEPS * calls_per_step, None if required else gpu_has_room
            backbone.run_blocks = RecordedBlocks(name, warm_up, has_room=has_room)
        elif required:
            raise ConfigError(
                f"train.cuda_graphs is true, but {type(backbone).__name__} has none of this package's "
                "transformer blocks: leave it out"
            )


def gpu_has_room() -> bool:
    """Return whether the GPU has memory to spare beyond what the steps so far took; if not, say so."""
    free, _ = torch.cuda.mem_get_info()
    held = torch.cuda.memory_allocated()
    room = free + torch.cuda.memory_reserved() - held - kept_by_recordings()
    needed = MEMORY_FACTOR * (torch.cuda.max_memory_allocated() - held)
    if needed > room:
        logger.info(
            "not recorded as CUDA graphs, which may need %.1f GiB where %.1f are left: a smaller "
            "batch leaves more",
            needed / 2**30,
            room / 2**30,
        )
    return needed <= room


def kept_by_recordings() -> int:
    """Return the bytes of a GPU that CUDA graphs keep for themselves and that do not count as allocated."""
    return sum(
        segment["total_size"] - segment["allocated_size"]
        for segment in torch.cuda.memory_snapshot()
        if tuple(segment["segment_pool_id"]) != (0, 0)
    )


def _parameters_by_module(planned: Planned) -> Iterator[tuple[nn.Module, dict[str, nn.Parameter]]]:
    """Yield every module of the blocks with its own parameters."""
    for module in (module for block, _ in planned for module in block.modules()):
        if own := dict(module.named_parameters(recurse=False)):
            yield module, own


@contextmanager
def _standing_in(stand_ins: dict[nn.Module, dict[str, nn.Parameter]]) -> Iterator[None]:
    """Let modules have other parameters inside the ``with``, which share the memory of their own."""
    own = {module: dict(module._parameters) for module in stand_ins}
    try:
        for module, others in stand_ins.items():
            module._parameters.update(others)
        yield
    finally:
        for module, values in own.items():
            module._parameters.update(values)


def _copied(subset: Subset) -> Subset:
    tensors = {name: value.clone() for name, value in vars(subset).items() if isinstance(value, Tensor)}
    return replace(subset, **tensors)


def _by_dtype(planned: Planned) -> list[list[Tensor]]:
    """Return the tensors of all subsets: positions, weights, and what is kept."""
    subsets = [subset for _, subsets in planned for subset in subsets]
    positions = [tensor for subset in subsets for tensor in (subset.rows, subset.place)]
    groups = [positions, [subset.weights for subset in subsets], [subset.kept for subset in subsets]]
    return groups if subsets else []
