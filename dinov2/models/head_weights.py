"""Loading the weights of a projection head, and saying which config would fit them."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dinov2.errors import WeightsError
from dinov2.models.entries import plain_name
from dinov2.models.sources import locate
from dinov2.models.weight_files import read_file

logger = logging.getLogger("dinov2")

# How torch.nn.utils.parametrizations.weight_norm calls what DINOv2's files call weight_g and weight_v.
PARAMETRIZED_NAMES = {
    "last_layer.parametrizations.weight.original0": "last_layer.weight_g",
    "last_layer.parametrizations.weight.original1": "last_layer.weight_v",
}


def load_head(head: nn.Module, source: str | Mapping[str, Any], key: str) -> None:
    """Load a :class:`DINOHead` from a head checkpoint, or raise and leave it as it was.

    Args:
        head: The head to fill.
        source: Path or address of the file, or the dictionary it would hold.
        key: Entry of the file: ``student_dino_head``, ``teacher_dino_head``, ``student_ibot_head`` or
            ``teacher_ibot_head``. A file with bare head weights needs none.

    Raises:
        WeightsError: The file cannot be read or the head has other sizes; the message names config values
            that would fit.
    """
    if isinstance(source, Mapping):
        name, content = "the given dictionary", source
    else:
        name, content = str(source), read_file(locate(source))
    state = _head_state(content, key, name)
    own = head.state_dict()
    if _shapes(state) != _shapes(own):
        raise WeightsError(_misfit(name, state, own, "ibot" if "ibot" in key else "dino"))
    broken = [key for key, tensor in state.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise WeightsError(
            f"The head in {name} contains NaN or infinity in {', '.join(broken[:3])}: the run that wrote it "
            "diverged or the file is damaged; use an earlier checkpoint."
        )
    head.load_state_dict(state, strict=True)
    logger.info("projection head: loaded %d tensors from %s", len(state), name)


def _head_state(content: Mapping[str, Any], key: str, source: str) -> dict[str, Tensor]:
    if key in content:
        content = content[key]
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise WeightsError(
            f'{source} has no entry "{key}", only {", ".join(list(map(str, content))[:5]) or "nothing"}: '
            "name the checkpoint of that head."
        )
    names = {name: plain_name(name) for name in tensors}
    return {PARAMETRIZED_NAMES.get(names[name], names[name]): tensor for name, tensor in tensors.items()}


def _shapes(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items()}


def _sizes(state: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the config values that a head's tensors imply, and its input width."""
    linears = [tensor for name, tensor in state.items() if name.startswith("mlp.") and tensor.ndim == 2]
    sizes = {}
    if linears:
        sizes = {"head_nlayers": len(linears), "head_bottleneck_dim": linears[-1].shape[0]}
        if len(linears) > 1:
            sizes["head_hidden_dim"] = linears[0].shape[0]
        sizes["width"] = linears[0].shape[1]
    if "last_layer.weight_v" in state:
        sizes["head_n_prototypes"] = state["last_layer.weight_v"].shape[0]
    return sizes


def _misfit(source: str, state: Mapping[str, Tensor], own: Mapping[str, Tensor], section: str) -> str:
    """Return the sentence for a head that does not fit."""
    found, built = _sizes(state), _sizes(own)
    differing = {name: value for name, value in found.items() if built.get(name) != value}
    width = differing.pop("width", None)
    parts = [f"set {section}.{name}={value} (it is {built.get(name)})" for name, value in differing.items()]
    if width is not None:
        parts.append(f"set student.arch to a backbone of width {width} (it is {built.get('width')})")
    if not parts:
        strange = sorted(state.keys() ^ own.keys())[:3]
        parts = [f"names that only one of the two has are {', '.join(strange)}; use a head written by DINOv2"]
    return f"The head in {source} does not fit the model: {'; '.join(parts)}."
