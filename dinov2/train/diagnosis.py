"""Where a loss or gradient that is not finite comes from: one batch, computed again under observation.

Every rank must take part, because the step has collectives. Nothing is changed: no optimizer step, no centre
update, and the gradients are dropped.
"""

import json
import logging
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dinov2 import distributed
from dinov2.compiled import uncompiled
from dinov2.errors import some_of
from dinov2.fsdp import reshard_fsdp_model
from dinov2.fsdp.sharding import local_part
from dinov2.train.ssl_meta_arch import SSLMetaArch

logger = logging.getLogger("dinov2")

SHOWN_IMAGES = 4  # in the sentence; the file has all


def diagnose(
    model: SSLMetaArch,
    batches: Sequence[dict[str, Any]],
    teacher_temp: float,
    seed: Callable[[int], None],
    *,
    iteration: int,
    images: list[str],
    output_dir: str | Path,
) -> str:
    """Compute ``batches`` again, write ``nonfinite_<iteration>.json`` and return what was found.

    Args:
        model: networks, in training mode.
        batches: what the loader yielded for this rank's step, one micro-batch or several.
        teacher_temp, seed: of the step, see :func:`dinov2.train.step.train_step`.
        iteration: zero-based.
        images: names of this rank's images.
        output_dir: where the main process writes the file.

    Returns:
        One clause, the same on every rank.
    """
    findings = {"rank": distributed.get_global_rank(), **_observe(model, batches, teacher_temp, seed)}
    by_rank = distributed.all_gather_objects({**findings, "images": images})
    path = Path(output_dir) / f"nonfinite_{iteration}.json"
    if distributed.is_main_process():
        try:
            path.write_text(json.dumps({"iteration": iteration, "ranks": by_rank}, indent=1) + "\n", "utf-8")
        except OSError as error:
            logger.warning("%s cannot be written: %s", path, error.strerror)
    return f"{_sentence(by_rank)}; {path} has all"


def _observe(
    model: SSLMetaArch,
    batches: Sequence[dict[str, Any]],
    teacher_temp: float,
    seed: Callable[[int], None],
) -> dict[str, Any]:
    """Run the step's forward and backward pass and note what is not finite first."""
    _drop_gradients(model)  # of the failed step; what is added to them would look guilty
    found: dict[str, Any] = {
        "parameters": [name for name, value in model.named_parameters() if not _finite(value)],
        "inputs": sorted(
            {
                key
                for batch in batches
                for key, value in batch.items()
                if isinstance(value, Tensor) and not _finite(value)
            }
        ),
        "losses": {},
        "activation": "",
        "gradient": "",
    }
    with uncompiled(), _hooks(model, found):
        for losses in model.micro_batch_losses(batches, teacher_temp, seed):
            for name, value in {**losses.logged, "total_loss": losses.total}.items():
                if name not in found["losses"] or not _finite(value):
                    found["losses"][name] = str(value.item())
            model.backprop_loss(losses.total / len(batches))
    reshard_fsdp_model(model.student)
    if not found["gradient"]:
        bad = [name for name, p in model.student.named_parameters() if not _finite(p.grad)]
        found["gradient"] = f"student.{bad[-1]}" if bad else ""  # the last layer's come first
    model.discard_center_updates()
    _drop_gradients(model)
    return found


def _drop_gradients(model: SSLMetaArch) -> None:
    for parameter in model.student.parameters():
        parameter.grad = None


@contextmanager
def _hooks(model: SSLMetaArch, found: dict[str, Any]):
    """Watch the outputs of all modules of both networks, and the gradients of the student's outputs."""
    handles = []
    for network in ("teacher", "student"):
        for name, module in getattr(model, network).named_modules():
            full_name = f"{network}.{name}" if name else network
            handles.append(module.register_forward_hook(_watch(full_name, found)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _watch(name: str, found: dict[str, Any]) -> Callable[..., None]:
    def note_gradient(gradient: Tensor) -> None:
        if not found["gradient"] and not _finite(gradient):
            found["gradient"] = name

    def note_output(module: nn.Module, inputs: Any, output: Any) -> None:
        for tensor in _tensors(output):
            if not found["activation"] and not _finite(tensor):
                found["activation"] = name
            if tensor.requires_grad:
                tensor.register_hook(note_gradient)

    return note_output


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, (list, tuple)) else []


def _finite(tensor: Tensor | None) -> bool:
    if tensor is None or not tensor.is_floating_point():
        return True
    return bool(local_part(tensor.detach()).isfinite().all())


def _sentence(by_rank: list[dict[str, Any]]) -> str:
    """Name the rank where it begins: losses and gradients of one rank reach the others by collectives."""
    kinds = (
        ("inputs", "the batch itself ({}) was not finite"),
        ("parameters", "the parameters {} were not finite"),
        ("activation", "the output of the module {} was the first that was not finite"),
        ("gradient", "the gradient at {} was the first that was not finite"),
    )
    present = [(kind, text) for kind, text in kinds if any(findings[kind] for findings in by_rank)]
    if not present:
        return "computed again, the same batch gave finite losses and gradients on every rank"
    kind, text = present[0]
    culprits = [findings for findings in by_rank if findings[kind]]
    first = culprits[0]
    value = first[kind] if isinstance(first[kind], str) else some_of(first[kind], 3)
    bad = [name for name, loss in first["losses"].items() if loss.lstrip("-") in ("nan", "inf")]
    ranks = some_of([findings["rank"] for findings in culprits], 8)
    return (
        f"computed again, on rank {ranks} {text.format(value)}"
        + _module_too(first, kind)
        + (f", and with it {some_of(bad, 8)}" if bad else "")
        + f"; its images are {some_of(first['images'], SHOWN_IMAGES)}"
    )


def _module_too(first: dict[str, Any], kind: str) -> str:
    if kind in ("inputs", "parameters") and first["activation"]:
        return f", then the output of the module {first['activation']}"
    return ""
