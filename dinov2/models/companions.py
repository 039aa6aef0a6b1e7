"""What stands beside a weight file and says what the weights cannot: attention heads and normalisation.

Read are ``config.json`` of transformers and of timm, transformers' ``preprocessor_config.json``, and the
``config.yaml`` of the training run that wrote the file. For published models that come without any of
these, :data:`PUBLISHED` knows shapes and constants.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dinov2.errors import WeightsError
from dinov2.models.architecture import Architecture

Constants = tuple[tuple[float, ...], tuple[float, ...]]  # channel means, channel standard deviations

IMAGENET: Constants = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
H_OPTIMUS: Constants = ((0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517))
MAX_COMPANION_BYTES = 1 << 20
RUN_CONFIG = "config.yaml"
EXPORTS = re.compile(r".*_checkpoint\.pth")  # below <run>/eval/<name>/
RUN_STATES = re.compile(r"model_\w+\.rank_\d+\.pth")  # in <run>/


@dataclass(frozen=True)
class Companion:
    """What the files beside a weight file say; None where they say nothing.

    Attributes:
        num_heads: Attention heads.
        normalisation: Means and standard deviations that the model was trained with.
        layer_norm_eps: Epsilon of the norms.
        origin: Names of the files read.
    """

    num_heads: int | None = None
    normalisation: Constants | None = None
    layer_norm_eps: float | None = None
    origin: tuple[str, ...] = ()


def read_companion(path: Path) -> Companion:
    """Read what stands beside the weight file ``path``; where two files say something, the nearer counts.

    Raises:
        WeightsError: a companion is damaged, or says that the network is one that this ViT cannot be.
    """
    readers = {
        _run_config(path): _from_run,
        path.parent / "preprocessor_config.json": _preprocessor_config,
        path.parent / "config.json": _model_config,
    }
    found: dict[str, Any] = {}
    origin = []
    for beside, read in readers.items():
        if beside is not None and beside.is_file():
            content = _content(beside)
            found |= {key: value for key, value in read(content, beside).items() if value is not None}
            origin.append(str(beside))
    return Companion(**found, origin=tuple(origin))


def _content(path: Path) -> Mapping[str, Any]:
    """Return what a JSON or YAML file holds, an empty mapping for anything but a mapping."""
    parse = yaml.safe_load if path.suffix == ".yaml" else json.loads
    try:
        if path.stat().st_size > MAX_COMPANION_BYTES:
            raise ValueError("it is larger than any model config")
        content = parse(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = str(error).partition("\n")[0]
        raise WeightsError(
            f'"{path}" beside the weights cannot be read ({reason}): repair or remove it.'
        ) from error
    return _mapping(content)


def _model_config(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Read transformers' flat config, or timm's with ``model_args`` and ``pretrained_cfg``."""
    activation = config.get("hidden_act", "gelu")
    if activation != "gelu" and not config.get("use_swiglu_ffn"):
        raise WeightsError(
            f'"{path}" says that the network uses the activation "{activation}": this vision transformer has '
            "GELU, so these weights would not compute what they were trained for."
        )
    arguments, pretrained = _mapping(config.get("model_args")), _mapping(config.get("pretrained_cfg"))
    eps = config.get("layer_norm_eps")
    return {
        "num_heads": _integer(config.get("num_attention_heads", arguments.get("num_heads"))),
        "normalisation": _constants(pretrained.get("mean"), pretrained.get("std")),
        "layer_norm_eps": float(eps) if _is_number(eps) else None,
    }


def _preprocessor_config(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    return {"normalisation": _constants(config.get("image_mean"), config.get("image_std"))}


def _run_config(path: Path) -> Path | None:
    """Return where the run that wrote the file has its config; None for names that no run gives."""
    folder = path.absolute().parent
    if RUN_STATES.fullmatch(path.name):
        return folder / RUN_CONFIG
    if EXPORTS.fullmatch(path.name) and folder.parent.name == "eval":
        return folder.parent.parent / RUN_CONFIG
    return None


def _from_run(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    crops = _mapping(config.get("crops"))
    return {
        "num_heads": _integer(_mapping(config.get("student")).get("num_heads")),
        "normalisation": _constants(crops.get("mean"), crops.get("std")),
    }


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _integer(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _constants(mean: Any, std: Any) -> Constants | None:
    lists = [value for value in (mean, std) if isinstance(value, (list, tuple)) and len(value) == 3]
    if len(lists) < 2 or not all(_is_number(number) for numbers in lists for number in numbers):
        return None
    means, deviations = (tuple(map(float, numbers)) for numbers in lists)
    return means, deviations


def same_constants(one: Constants, other: Constants) -> bool:
    """Whether two normalisations are the same, apart from rounding to float32 on the way."""
    pairs = zip((*one[0], *one[1]), (*other[0], *other[1]), strict=True)
    return all(math.isclose(mine, theirs, rel_tol=1e-4, abs_tol=1e-6) for mine, theirs in pairs)


@dataclass(frozen=True)
class Published:
    """A published model as its weights show it.

    Attributes:
        name: For messages.
        shape: Width, blocks, patch size, registers and stored patches; the latter None for any.
        feed_forward: Kind of feed-forward.
        normalisation: Its constants where its authors state them; None where we do not know them.
        layer_scale: Whether it has LayerScale.
    """

    name: str
    shape: tuple[int, int, int, int, int | None]
    feed_forward: str
    normalisation: Constants | None
    layer_scale: bool = True


PUBLISHED = (
    Published("DINOv2 ViT-S/14", (384, 12, 14, 0, 1369), "mlp", IMAGENET),
    Published("DINOv2 ViT-B/14", (768, 12, 14, 0, 1369), "mlp", IMAGENET),
    Published("DINOv2 ViT-L/14", (1024, 24, 14, 0, 1369), "mlp", IMAGENET),
    Published("DINOv2 ViT-g/14", (1536, 40, 14, 0, 1369), "swiglufused", IMAGENET),
    Published("DINOv2 ViT-S/14 with registers", (384, 12, 14, 4, 1369), "mlp", IMAGENET),
    Published("DINOv2 ViT-B/14 with registers", (768, 12, 14, 4, 1369), "mlp", IMAGENET),
    Published("DINOv2 ViT-L/14 with registers", (1024, 24, 14, 4, 1369), "mlp", IMAGENET),
    Published("DINOv2 ViT-g/14 with registers", (1536, 40, 14, 4, 1369), "swiglufused", IMAGENET),
    Published("UNI", (1024, 24, 16, 0, 196), "mlp", IMAGENET),
    Published("UNI2-h", (1536, 24, 14, 8, 256), "swiglufused", IMAGENET),
    Published("Virchow", (1280, 32, 14, 0, 256), "swiglufused", None),
    Published("Virchow2", (1280, 32, 14, 4, 256), "swiglufused", None),
    Published("H-optimus", (1536, 40, 14, 4, 256), "swiglufused", H_OPTIMUS),
    Published("Prov-GigaPath", (1536, 40, 16, 0, 196), "swiglufused", IMAGENET),
    Published("Phikon", (768, 12, 16, 0, 196), "mlp", None, layer_scale=False),
)


def published_like(architecture: Architecture, patches: int) -> Published | None:
    """Return the published model that has these sizes; others may have them, too.

    Args:
        architecture: Of the weights.
        patches: Patches that their position embeddings are laid out for.
    """
    shape = (
        architecture.width,
        architecture.depth,
        architecture.patch_size,
        architecture.register_tokens,
        patches,
    )
    return next(
        (
            model
            for model in PUBLISHED
            if model.shape == shape
            and model.feed_forward == architecture.feed_forward
            and model.layer_scale == architecture.layer_scale
        ),
        None,
    )
