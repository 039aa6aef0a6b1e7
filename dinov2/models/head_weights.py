"""Loading the weights of a projection head, and saying which config would fit them."""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dinov2.errors import WeightsError, some_of
from dinov2.models.entries import OTHER_ENTRY, leaves, plain_name
from dinov2.models.integrity import sha256_of
from dinov2.models.report import LoadReport
from dinov2.models.sources import locate
from dinov2.models.stored import StoredTensor, stored_content
from dinov2.models.values import check_values
from dinov2.models.weight_files import OpenedFile, open_file

logger = logging.getLogger("dinov2")

HeadState = dict[str, StoredTensor]

# How torch.nn.utils.parametrizations.weight_norm calls what DINOv2's files call weight_g and weight_v.
PARAMETRIZED_NAMES = {
    "last_layer.parametrizations.weight.original0": "last_layer.weight_g",
    "last_layer.parametrizations.weight.original1": "last_layer.weight_v",
}


def load_head(
    head: nn.Module, source: str | Mapping[str, Any] | OpenedFile, key: str, *, sha256: str = ""
) -> LoadReport:
    """Load a :class:`DINOHead` from a head checkpoint, or raise and leave it as it was.

    Args:
        head: The head to fill.
        source: Path or address of the file, the file if it is open already, or the dictionary it would hold.
        key: Entry of the file: ``student_dino_head``, ``teacher_dino_head``, ``student_ibot_head`` or
            ``teacher_ibot_head``. A file with bare head weights needs none; in a ``teacher_checkpoint.pth``
            the head stands beside the backbone.
        sha256: Digest of the file for the report, where it is known; else it is computed.

    Raises:
        WeightsError: The file cannot be read or the head has other sizes; the message names config values
            that would fit.
    """
    metadata: Mapping[str, str] = {}
    path = None
    if isinstance(source, Mapping):
        name, content = "the given dictionary", stored_content(source)
    else:
        opened = source if isinstance(source, OpenedFile) else open_file(locate(source))
        name = str(opened.path) if isinstance(source, OpenedFile) else source
        path, content, metadata = opened.path, opened.content, opened.metadata
    state = find_head(content, key)
    if not state:
        raise WeightsError(
            f'{name} has no entry "{key}", only {some_of(content, 5) or "nothing"}: '
            "name the checkpoint of that head."
        )
    own = head.state_dict()
    if _shapes(state) != _shapes(own):
        raise WeightsError(_misfit(name, state, own, "ibot" if "ibot" in key else "dino"))
    tensors = dict(leaves(content))
    check_values(name, state, tensors, metadata)
    with torch.no_grad():
        for parameter, tensor in own.items():
            tensor.copy_(state[parameter].read())
    logger.info("projection head: loaded %d tensors from %s", len(state), name)
    used = {file_name: [parameter] for parameter, stored in state.items() for file_name in stored.names}
    return LoadReport(
        source=name,
        path=str(path or ""),
        sha256=sha256 or (sha256_of(path) if path else ""),
        layout="DINOv2",
        loaded=list(own),
        converted={parameter: ", ".join(stored.how) for parameter, stored in state.items() if stored.how},
        used=used,
        unused={file_name: OTHER_ENTRY for file_name in tensors if file_name not in used},
    )


def find_head(content: Mapping[str, Any], key: str, *, bare: bool = True) -> HeadState:
    """Return a head's tensors under DINOv2's names, none if the content of the file has no such head.

    Args:
        content: What a file holds, tensors as :class:`StoredTensor`.
        key: See :func:`load_head`.
        bare: Take the tensors of a file without entries for those of the head, whichever is asked for.
    """
    network, _, kind = key.partition("_")
    if isinstance(content.get(key), Mapping):
        tensors = content[key]
    elif isinstance(content.get(network), Mapping):
        tensors = _below(content[network], f"{kind}.")
    elif isinstance(content.get("model"), Mapping):  # a run state holds both networks
        both = content["model"]
        own = {name: value for name, value in both.items() if str(name).startswith(f"{network}.")}
        tensors = _below(own, f"{kind}.")
    else:
        tensors = content if bare else {}
    state = dict(_renamed(tensors))
    return state if "last_layer.weight_v" in state else {}


def _below(network: Mapping[str, Any], start: str) -> dict[str, Any]:
    plain = {plain_name(name): value for name, value in network.items()}
    return {name.removeprefix(start): value for name, value in plain.items() if name.startswith(start)}


def _renamed(tensors: Mapping[str, Any]) -> Iterator[tuple[str, StoredTensor]]:
    for name, stored in tensors.items():
        if isinstance(stored, StoredTensor):
            plain = plain_name(name)
            ours = PARAMETRIZED_NAMES.get(plain, plain)
            yield ours, stored if ours == plain else stored.converted("renamed from a parametrization")


def _shapes(state: Mapping[str, Tensor | StoredTensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def head_sizes(state: Mapping[str, Tensor | StoredTensor]) -> dict[str, int]:
    """Return the config values that a head's tensors imply, and its input width."""
    linears = [tensor for name, tensor in state.items() if name.startswith("mlp.") and len(tensor.shape) == 2]
    sizes = {}
    if linears:
        sizes = {"head_nlayers": len(linears), "head_bottleneck_dim": linears[-1].shape[0]}
        if len(linears) > 1:
            sizes["head_hidden_dim"] = linears[0].shape[0]
        sizes["width"] = linears[0].shape[1]
    if "last_layer.weight_v" in state:
        sizes["head_n_prototypes"] = state["last_layer.weight_v"].shape[0]
    return sizes


def _misfit(source: str, state: Mapping[str, StoredTensor], own: Mapping[str, Tensor], section: str) -> str:
    """Return the sentence for a head that does not fit."""
    found, built = head_sizes(state), head_sizes(own)
    differing = {name: value for name, value in found.items() if built.get(name) != value}
    width = differing.pop("width", None)
    parts = [f"set {section}.{name}={value} (it is {built.get(name)})" for name, value in differing.items()]
    if width is not None:
        parts.append(f"set student.arch to a backbone of width {width} (it is {built.get('width')})")
    if not parts:
        strange = sorted(state.keys() ^ own.keys())[:3]
        parts = [f"names that only one of the two has are {', '.join(strange)}; use a head written by DINOv2"]
    return f"The head in {source} does not fit the model: {'; '.join(parts)}."
