"""What stands beside a weight file and says what the weights cannot: attention heads and normalisation.

Read are ``config.json`` of transformers and of timm, transformers' ``preprocessor_config.json``, and the
``config.yaml`` of the training run that wrote the file. For published models that come without any of
these, :data:`PUBLISHED` knows shapes and constants.
"""

import json
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
RUN_FOLDERS_UP = 3  # <run>/eval/training_<n>/teacher_checkpoint.pth


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
    """Read what stands beside the weight file ``path``.

    Raises:
        WeightsError: a companion is damaged, or says that the network is one that this ViT cannot be.
    """
    found: dict[str, Any] = {}
    origin = []
    readers = {"config.json": _model_config, "preprocessor_config.json": _preprocessor_config}
    for name, read in readers.items():
        beside = path.parent / name
        if beside.is_file():
            found |= {key: value for key, value in read(_json(beside), beside).items() if value is not None}
            origin.append(str(beside))
    run = _run_config(path)
    if run is not None:
        found |= {key: value for key, value in _from_run(run).items() if value is not None}
        origin.append(str(run))
    return Companion(**found, origin=tuple(origin))


def _json(path: Path) -> Mapping[str, Any]:
    try:
        if path.stat().st_size > MAX_COMPANION_BYTES:
            raise ValueError("it is larger than any model config")
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(
            f'"{path}" beside the weights cannot be read ({error}): repair or remove it.'
        ) from error
    return content if isinstance(content, Mapping) else {}


def _model_config(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Read transformers' flat config, or timm's with ``model_args`` and ``pretrained_cfg``."""
    activation = config.get("hidden_act", "gelu")
    if activation != "gelu" and not config.get("use_swiglu_ffn"):
        raise WeightsError(
            f'"{path}" says that the network uses the activation "{activation}": this vision transformer has '
            "GELU, so these weights would not compute what they were trained for."
        )
    arguments = config.get("model_args") or {}
    pretrained = config.get("pretrained_cfg") or {}
    return {
        "num_heads": _integer(config.get("num_attention_heads", arguments.get("num_heads"))),
        "normalisation": _constants(pretrained.get("mean"), pretrained.get("std")),
        "layer_norm_eps": config.get("layer_norm_eps"),
    }


def _preprocessor_config(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    return {"normalisation": _constants(config.get("image_mean"), config.get("image_std"))}


def _run_config(path: Path) -> Path | None:
    """Return the config of the training run whose output folder holds the file."""
    for folder in list(path.absolute().parents)[:RUN_FOLDERS_UP]:
        if (folder / RUN_CONFIG).is_file():
            return folder / RUN_CONFIG
    return None


def _from_run(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}  # somebody else's config.yaml
    if not (isinstance(config, Mapping) and isinstance(config.get("student"), Mapping)):
        return {}
    crops = config.get("crops") or {}
    return {
        "num_heads": _integer(config["student"].get("num_heads")),
        "normalisation": _constants(crops.get("mean"), crops.get("std")),
    }


def _integer(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _constants(mean: Any, std: Any) -> Constants | None:
    try:
        constants = tuple(map(float, mean)), tuple(map(float, std))
    except (TypeError, ValueError):
        return None
    return constants if len(constants[0]) == len(constants[1]) == 3 else None


@dataclass(frozen=True)
class Published:
    """A published model as its weights show it.

    Attributes:
        name: For messages.
        shape: Width, blocks, patch size, registers and stored patches; the latter None for any.
        feed_forward: Kind of feed-forward.
        normalisation: Its constants where its authors state them; None where we do not know them.
    """

    name: str
    shape: tuple[int, int, int, int, int | None]
    feed_forward: str
    normalisation: Constants | None


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
    Published("Phikon", (768, 12, 16, 0, 196), "mlp", None),
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
            if model.shape == shape and model.feed_forward == architecture.feed_forward
        ),
        None,
    )
