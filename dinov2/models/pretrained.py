"""Loading pretrained weights: the one place where a model takes over what a file holds.

A straight line: locate the file -> read it safely -> choose the entry -> strip wrapper prefixes -> convert
names -> resample positions -> compare with the model -> load strictly -> report. Whatever does not fit is an
error before the first weight of the model changes.
"""

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dinov2.errors import WeightsError
from dinov2.layers.pos_embed import resample_positions
from dinov2.models.architecture import Architecture
from dinov2.models.conversion import State, flat_name, is_square, to_dinov2_names
from dinov2.models.entries import choose_network, strip_wrappers
from dinov2.models.head_weights import load_head
from dinov2.models.sources import locate
from dinov2.models.weight_files import read_file

__all__ = ["LoadReport", "load_backbone", "load_head", "load_pretrained_weights", "read_state_dict"]

logger = logging.getLogger("dinov2")

NAMES_SHOWN = 3


@dataclass(frozen=True)
class LoadReport:
    """What became of every tensor of a weight file and of the model.

    Attributes:
        source: What was read.
        loaded: Parameters of the model taken from the file.
        converted: Those of them that were renamed or changed -> how.
        resampled: Those of them that were brought to another size -> how.
        missing: Parameters that keep their initial values, as the file lacks them.
        unused: Entries of the file that are no part of a backbone: projection heads and classifiers.
    """

    source: str
    loaded: list[str]
    converted: dict[str, str] = field(default_factory=dict)
    resampled: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """Return the report as one line."""
        total = len(self.loaded) + len(self.missing)
        parts = [f"loaded {len(self.loaded)} of {total} tensors from {self.source}"]
        ways = list(self.converted.values())
        parts += [f"{ways.count(how)} {how}" for how in dict.fromkeys(ways)]
        parts += [f"{name} resampled {how}" for name, how in self.resampled.items()]
        if self.missing:
            parts.append(f"initial value kept: {', '.join(self.missing)}")
        if self.unused:
            parts.append(f"not part of a backbone and unused: {_first(self.unused)}")
        return "; ".join(parts)


def read_state_dict(source: str, *, entry: str | None = None) -> State:
    """Read the backbone weights in a file, under the names they have there without wrapper prefixes.

    Args:
        source: Path to a ``.pth``, ``.pt`` or ``.safetensors`` file, a folder with one, or an address.
        entry: Which network of a checkpoint to take, ``teacher`` or ``student``; by default the teacher if
            there is one. A file with bare weights has nothing to choose from and ignores it.

    Returns:
        Parameter name -> CPU tensor, heads left out. Names and shapes are not converted yet.

    Raises:
        WeightsError: The file is missing, unreadable or unsafe, or has no such entry.
    """
    return _open(source, entry)[1]


def load_backbone(
    model: nn.Module,
    source_or_state: str | Mapping[str, Any],
    *,
    entry: str | None = None,
    allow_missing: Iterable[str] = ("mask_token",),
) -> LoadReport:
    """Load pretrained weights into a :class:`DinoVisionTransformer`, or raise and leave it as it was.

    Args:
        model: The backbone, with or without block chunks.
        source_or_state: What :func:`read_state_dict` takes, or a dictionary such as a file would hold.
        entry: See :func:`read_state_dict`.
        allow_missing: Parameters that may be absent from the weights and then keep their values. Only masked
            images use ``mask_token``, so releases in other layouts leave it out.

    Raises:
        WeightsError: The weights cannot be read, contain NaN or infinity, or do not fit the model.
    """
    source, state, unused = _open(source_or_state, entry)
    own = {flat_name(name): tensor for name, tensor in model.state_dict().items()}
    state, converted = to_dinov2_names(state)
    _check_architecture(source, state, own)
    state, resampled = _fit_positions(source, state, model)
    missing = _check_tensors(source, state, own, set(allow_missing))

    model_names = {flat_name(name): name for name in model.state_dict()}
    weights = {name: state[flat] if flat in state else own[flat] for flat, name in model_names.items()}
    model.load_state_dict(weights, strict=True)
    report = LoadReport(
        source=source,
        loaded=[name for flat, name in model_names.items() if flat in state],
        converted={model_names[flat]: how for flat, how in converted.items()},
        resampled=resampled,
        missing=[model_names[flat] for flat in missing],
        unused=unused,
    )
    logger.info("pretrained weights: %s", report.summary())
    return report


def load_pretrained_weights(
    model: nn.Module, pretrained_weights: str, checkpoint_key: str | None
) -> LoadReport:
    """:func:`load_backbone` under its historic name and argument order."""
    return load_backbone(model, pretrained_weights, entry=checkpoint_key)


def _open(source: str | Mapping[str, Any], entry: str | None) -> tuple[str, State, list[str]]:
    """Return a name for messages, the backbone's tensors, and the names of what is no backbone."""
    if isinstance(source, Mapping):
        name, content = "the given dictionary", source
    else:
        name, content = str(source), read_file(locate(source, entry=entry))
    return name, *strip_wrappers(choose_network(content, entry, name), name)


def _check_architecture(source: str, state: State, own: State) -> None:
    """Raise if the weights belong to no ViT or to another one."""
    if not state.keys() & own.keys():
        raise WeightsError(
            f"No tensor of {source} has the name of a backbone parameter (it has "
            f"{_first(list(state)) or 'none'}): expected the weights of a DINOv2, timm or transformers ViT."
        )
    differences = Architecture.of(state).differences(Architecture.of(own))
    if differences:
        raise WeightsError(
            f"The weights in {source} do not fit the model: {'; '.join(differences)}; "
            "change these config keys, or choose other weights."
        )


def _fit_positions(source: str, state: State, model: nn.Module) -> tuple[State, dict[str, str]]:
    """Resample the position embeddings to the model's grid if they are laid out for another one."""
    positions = state.get("pos_embed")
    if positions is None or positions.shape == model.pos_embed.shape:
        return state, {}
    rows, columns = model.patch_embed.patches_resolution
    if positions.ndim != 3 or not is_square(positions.shape[1] - 1):
        raise WeightsError(
            f"pos_embed in {source} has shape {tuple(positions.shape)}, which is not a square grid of "
            f"patches and a cls position: it cannot be resampled to the model's {rows}x{columns} grid."
        )
    offset, antialias = model.interpolate_offset, model.interpolate_antialias
    resampled = resample_positions(positions, (rows, columns), offset=offset, antialias=antialias)
    side = math.isqrt(positions.shape[1] - 1)
    sampling = f"scale factor with offset {offset:g}" if offset else "exact size"
    smoothing = "with" if antialias else "no"
    how = f"{side}x{side} -> {rows}x{columns}, bicubic by {sampling}, {smoothing} antialias"
    return {**state, "pos_embed": resampled.to(positions.dtype)}, {"pos_embed": how}


def _check_tensors(source: str, state: State, own: State, allow_missing: set[str]) -> list[str]:
    """Raise unless the tensors match the model's one by one; return the names that may be missing and are."""
    missing = [name for name in own if name not in state]
    problems = {
        "missing": [name for name in missing if name not in allow_missing],
        "not known to the model": [name for name in state if name not in own],
        "of another shape": [
            f"{name} {tuple(tensor.shape)} instead of {tuple(own[name].shape)}"
            for name, tensor in state.items()
            if name in own and tensor.shape != own[name].shape
        ],
        "not floating point": [name for name, tensor in state.items() if not tensor.is_floating_point()],
    }
    found = [f"{len(names)} {what}: {_first(names)}" for what, names in problems.items() if names]
    if found:
        raise WeightsError(
            f"The weights in {source} do not fit the model: {'; '.join(found)}; "
            "use weights of the same architecture, or change the student.* options of the config."
        )
    broken = [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise WeightsError(
            f"The weights in {source} contain NaN or infinity in {len(broken)} tensors ({_first(broken)}): "
            "the run that wrote them diverged or the file is damaged; use an earlier checkpoint."
        )
    return missing


def _first(names: list[str]) -> str:
    return ", ".join(names[:NAMES_SHOWN]) + (", ..." if len(names) > NAMES_SHOWN else "")
