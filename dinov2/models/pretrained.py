"""Loading pretrained weights: the one place where a model takes over what a file holds.

A straight line: locate the file -> open it safely -> choose the entry -> strip wrapper prefixes -> convert
names -> compare with the model -> resample positions -> check every value -> load -> report. Whatever does
not fit is an error before the first weight of the model changes. Values are read one tensor at a time, so
that loading takes little more memory than the model itself.
"""

import logging
from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dinov2.errors import WeightsError
from dinov2.models import build_model
from dinov2.models.architecture import Architecture
from dinov2.models.backbone_weights import BackboneWeights, open_weights
from dinov2.models.conversion import (
    State,
    flat_name,
)
from dinov2.models.fitting import check_methods, fit_patch_embedding, fit_positions
from dinov2.models.head_weights import load_head
from dinov2.models.integrity import sha256_of
from dinov2.models.report import LoadReport, first_names
from dinov2.models.stored import StoredTensor
from dinov2.models.values import check_values
from dinov2.models.vision_transformer import DinoVisionTransformer

__all__ = [
    "BackboneWeights",
    "LoadReport",
    "build_from_weights",
    "check_loadable",
    "load_backbone",
    "load_head",
    "load_pretrained_weights",
    "open_weights",
    "read_state_dict",
]

logger = logging.getLogger("dinov2")


def read_state_dict(source: str | Mapping[str, Any], *, entry: str | None = None) -> dict[str, Tensor]:
    """Read the backbone weights in a file, under the names they have there without wrapper prefixes.

    Args:
        source: See :func:`open_weights`.
        entry: See :func:`open_weights`.

    Returns:
        Parameter name -> CPU tensor, heads left out. Names and shapes are not converted yet.

    Raises:
        WeightsError: See :func:`open_weights`.
    """
    weights = open_weights(source, entry)
    floating = {name: stored for name, stored in weights.plain.items() if stored.is_floating_point}
    check_values(weights.source, floating, weights.tensors, weights.metadata)
    return {name: stored.read() for name, stored in weights.plain.items()}


def load_backbone(
    model: nn.Module,
    source_or_state: str | Mapping[str, Any] | BackboneWeights,
    *,
    entry: str | None = None,
    allow_missing: Iterable[str] = ("mask_token",),
    pos_embed: str = "interpolate",
    patch_embed: str = "none",
) -> LoadReport:
    """Load pretrained weights into a :class:`DinoVisionTransformer`, or raise and leave it as it was.

    Args:
        model: The backbone, with or without block chunks. On the meta device it gets its memory here.
        source_or_state: What :func:`open_weights` takes or returns.
        entry: See :func:`open_weights`.
        allow_missing: Parameters that may be absent from the weights and then keep their values. Only masked
            images use ``mask_token``, so releases in other layouts leave it out.
        pos_embed: How positions of another grid are fitted: ``interpolate`` (bicubic, with the model's offset
            and antialiasing) or ``center_crop``.
        patch_embed: How a patch embedding of another size is fitted: ``none``, which makes it an error, or
            ``pseudo_inverse``.

    Raises:
        WeightsError: The weights cannot be read, are damaged, contain NaN or infinity, or do not fit.
    """
    check_methods(pos_embed, patch_embed)
    given = source_or_state
    weights = given if isinstance(given, BackboneWeights) else open_weights(given, entry)
    fitted = _fit(model, weights, set(allow_missing), pos_embed, patch_embed)
    model_names = {flat_name(name): name for name in model.state_dict()}
    _fill(model, {model_names[flat]: stored for flat, stored in fitted.state.items()})
    report = _report(weights, fitted, model)
    logger.info("pretrained weights: %s", report.summary())
    return report


def check_loadable(weights: BackboneWeights) -> None:
    """Do everything that loading does before the first weight of a model changes, for a model that fits.

    Raises:
        WeightsError: :func:`build_from_weights` would refuse the weights.
    """
    heads = weights.architecture.num_heads or weights.usual_heads
    model = _build_empty(weights, None, {} if heads else {"num_heads": 1})
    _fit(model, weights, {"mask_token"}, "interpolate", "none")


class _Fitted(NamedTuple):
    """Weights that fit a model one by one."""

    state: State
    missing: list[str]
    resampled: dict[str, str]


def _fit(
    model: nn.Module, weights: BackboneWeights, allow_missing: set[str], pos_embed: str, patch_embed: str
) -> _Fitted:
    """Fit weights to a model and check them; nothing is changed."""
    own = {flat_name(name): tensor for name, tensor in model.state_dict().items()}
    state = dict(weights.state)
    resamples_patches = patch_embed == "pseudo_inverse"
    _check_architecture(weights, model, own, ignore=("patch_size",) if resamples_patches else ())
    resampled = fit_patch_embedding(state, own) if resamples_patches else {}
    resampled |= fit_positions(weights.source, state, model, pos_embed)
    missing = _check_tensors(weights.source, state, own, allow_missing)
    _check_memory(weights.source, missing, own)
    check_values(weights.source, state, weights.tensors, weights.metadata)
    return _Fitted(state, missing, resampled)


def load_pretrained_weights(
    model: nn.Module, pretrained_weights: str, checkpoint_key: str | None
) -> LoadReport:
    """:func:`load_backbone` under its historic name and argument order."""
    return load_backbone(model, pretrained_weights, entry=checkpoint_key)


def build_from_weights(
    source: str | Mapping[str, Any] | BackboneWeights,
    *,
    entry: str | None = None,
    img_size: int | None = None,
    **options: Any,
) -> DinoVisionTransformer:
    """Build the backbone that the weights belong to, and load them.

    Args:
        source: What :func:`open_weights` takes or returns.
        entry: See :func:`open_weights`.
        img_size: Pixels that the positions are resampled to; by default they stay as they are stored.
        options: Values of the ``student`` config section in place of those read off the weights, such as
            ``num_heads`` or ``block_chunks``. Positions are interpolated as DINOv2's release does it: with
            the historic offset in models without registers, to the exact size and antialiased in others.

    Returns:
        The backbone in evaluation mode.

    Raises:
        WeightsError: See :func:`load_backbone`; or the weights do not tell enough.
    """
    weights = source if isinstance(source, BackboneWeights) else open_weights(source, entry)
    model = _build_empty(weights, img_size, options)
    load_backbone(model, weights)
    return model.eval()


def _build_empty(
    weights: BackboneWeights, img_size: int | None, options: Mapping[str, Any]
) -> DinoVisionTransformer:
    """Build the backbone that the weights belong to on the meta device; see :func:`build_from_weights`."""
    architecture = weights.architecture
    if "num_heads" in options:
        architecture = architecture.with_heads(options["num_heads"])
    values = architecture.student_options(weights.source)
    exact = architecture.register_tokens > 0
    defaults = {
        "block_chunks": 0,
        "drop_path_rate": 0.0,
        "drop_path_uniform": False,
        "interpolate_offset": 0.0 if exact else 0.1,
        "interpolate_antialias": exact,
    }
    args = SimpleNamespace(**{**defaults, **values, **options})
    if img_size is None and weights.grid is None:
        raise WeightsError(
            f"The weights in {weights.source} have no positions for a square grid of patches: state img_size."
        )
    if img_size is None:
        img_size = weights.grid * architecture.patch_size
    elif img_size % architecture.patch_size:
        raise WeightsError(
            f"img_size {img_size} does not divide into the patches of {architecture.patch_size} px that the "
            f"weights in {weights.source} have: use a multiple."
        )
    with torch.device("meta"):
        model, _ = build_model(args, only_teacher=True, img_size=img_size)
    return model


def _check_architecture(
    weights: BackboneWeights, model: nn.Module, own: Mapping[str, Tensor], ignore: tuple[str, ...]
) -> None:
    """Raise if the weights belong to no ViT or to another one."""
    if not weights.state.keys() & own.keys():
        raise WeightsError(
            f"No tensor of {weights.source} has the name of a backbone parameter (it has "
            f"{first_names(list(weights.state)) or 'none'}): expected the weights of a DINOv2, timm or "
            "transformers ViT."
        )
    models = Architecture.of(own, num_heads=model.num_heads, norm_eps=model.norm.eps)
    differences = weights.architecture.without(*ignore).differences(models)
    if differences:
        raise WeightsError(
            f"The weights in {weights.source} do not fit the model: {'; '.join(differences)}; "
            "change these config keys, set student.arch=auto to take them from the weights, or choose other "
            "weights."
        )


def _check_tensors(
    source: str, state: State, own: Mapping[str, Tensor], allow_missing: set[str]
) -> list[str]:
    """Raise unless the tensors match the model's one by one; return the names that may be missing and are."""
    missing = [name for name in own if name not in state]
    problems = {
        "missing": [name for name in missing if name not in allow_missing],
        "not known to the model": [name for name in state if name not in own],
        "of another shape": [
            f"{name} {stored.shape} instead of {tuple(own[name].shape)}"
            for name, stored in state.items()
            if name in own and stored.shape != tuple(own[name].shape)
        ],
        "not floating point": [name for name, stored in state.items() if not stored.is_floating_point],
    }
    found = [f"{len(names)} {what}: {first_names(names)}" for what, names in problems.items() if names]
    if found:
        raise WeightsError(
            f"The weights in {source} do not fit the model: {'; '.join(found)}; "
            "use weights of the same architecture, or change the student.* options of the config."
        )
    return missing


def _check_memory(source: str, missing: list[str], own: Mapping[str, Tensor]) -> None:
    """Raise if a parameter has no value anywhere; a mask token may start at zero."""
    empty = [name for name in missing if own[name].is_meta and name != "mask_token"]
    if empty:
        raise WeightsError(
            f"The weights in {source} lack {first_names(empty)}, and the model on the meta device has no "
            "values to keep: build the model in memory."
        )


@torch.no_grad()
def _fill(model: nn.Module, state: Mapping[str, StoredTensor]) -> None:
    """Write stored tensors into a model by its own names; give memory to what lies on the meta device."""
    assigned: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if tensor.is_meta:
            value = state[name].read() if name in state else torch.zeros(tensor.shape)
            # A tensor that is mapped from its file would change with it.
            assigned[name] = value.to(tensor.dtype, copy=True)
        elif name in state:
            tensor.copy_(state[name].read())
    if assigned:
        model.load_state_dict(assigned, strict=False, assign=True)


def _report(weights: BackboneWeights, fitted: _Fitted, model: nn.Module) -> LoadReport:
    model_names = {flat_name(name): name for name in model.state_dict()}
    values = {flat_name(name): value for name, value in model.state_dict().items()}
    used: dict[str, list[str]] = {}
    for flat, stored in fitted.state.items():
        for name in stored.names:
            used.setdefault(name, []).append(model_names[flat])
    loaded_numbers = sum(values[flat].numel() for flat in fitted.state)
    single_file = weights.path is not None and weights.path.suffix != ".json"
    return LoadReport(
        source=weights.source,
        path=str(weights.path or ""),
        sha256=sha256_of(weights.path) if single_file else "",
        layout=weights.layout,
        architecture=weights.architecture.describe(),
        loaded=[name for flat, name in model_names.items() if flat in fitted.state],
        converted={
            model_names[flat]: ", ".join(how) for flat, stored in weights.state.items() if (how := stored.how)
        },
        resampled={model_names[flat]: how for flat, how in fitted.resampled.items()},
        missing={model_names[flat]: _initial_value(values[flat]) for flat in fitted.missing},
        used=used,
        unused=weights.unused,
        share=loaded_numbers / sum(value.numel() for value in values.values()),
        normalisation=weights.normalisation,
        normalisation_origin=weights.normalisation_origin,
        looks_like=weights.looks_like,
    )


def _initial_value(tensor: Tensor) -> str:
    return "zeros" if not tensor.any() else "keeps its random initial values"
