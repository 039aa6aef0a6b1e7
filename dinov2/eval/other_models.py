"""Models of timm and transformers in the place of a backbone, to be scored on the same split.

Named where weights are: ``timm:NAME`` is what ``timm.create_model`` takes (``timm:local-dir:FOLDER`` is a
folder on disk), ``transformers:NAME`` what ``AutoModel.from_pretrained`` takes (a folder, or a name of the
Hub). Both libraries are optional, and are imported where they are asked for.

Shapes: B images, D width, N patches.
"""

import importlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from dinov2.errors import ConfigError, WeightsError

logger = logging.getLogger("dinov2")

Block = tuple[Tensor, Tensor]


class OtherBackbone(nn.Module):
    """A model of another library that gives features as a backbone does.

    Args:
        name: How it was named, with the library.
        model: The model.
        normalisation: ``mean`` and ``std`` per channel that it was trained with; None if it does not say.
    """

    def __init__(self, name: str, model: nn.Module, normalisation: dict[str, list[float]] | None) -> None:
        super().__init__()
        self.name = name
        self.model = model
        self.normalisation = normalisation

    @property
    def n_blocks(self) -> int:
        """How many blocks it has.

        Raises:
            ConfigError: They do not give a cls token and patch tokens.
        """
        count = self._count_blocks()
        if not count:
            raise ConfigError(
                f"{self.name} has no blocks with a cls token and patch tokens, which the linear evaluation's "
                "grid and --last-blocks take: use knn, log_regression or linear --protocol eva, and extract "
                "with --last-blocks 0"
            )
        return count

    def get_intermediate_layers(
        self, images: Tensor, n: int = 1, return_class_token: bool = True
    ) -> tuple[Block, ...]:
        """Return per block, the last one last, its patch tokens (B, N, D) and its cls token (B, D).

        All have passed the final norm.
        """
        if not return_class_token:
            raise ValueError("blocks are given with their cls token alone")
        return self._blocks(images, min(n, self.n_blocks))

    def _count_blocks(self) -> int:
        raise NotImplementedError

    def _blocks(self, images: Tensor, n: int) -> tuple[Block, ...]:
        raise NotImplementedError


class TimmBackbone(OtherBackbone):
    """A model of timm without its classifier; the features are what the classifier would get."""

    def forward(self, images: Tensor) -> Tensor:
        """Return the features (B, D)."""
        return self.model(images)

    def _count_blocks(self) -> int:
        has_cls = getattr(self.model, "cls_token", None) is not None
        return len(self.model.blocks) if has_cls and hasattr(self.model, "blocks") else 0

    def _blocks(self, images: Tensor, n: int) -> tuple[Block, ...]:
        blocks = self.model.forward_intermediates(
            images,
            indices=n,
            return_prefix_tokens=True,
            norm=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        return tuple((patches, prefix[:, 0]) for patches, prefix in blocks)


class TransformersBackbone(OtherBackbone):
    """A model of transformers; the features are the final cls token, or the pooled output if it has none."""

    def forward(self, images: Tensor) -> Tensor:
        """Return the features (B, D)."""
        outputs = self.model(pixel_values=images)
        if self._has_cls():
            return outputs.last_hidden_state[:, 0]
        return outputs.pooler_output.flatten(1)

    def _has_cls(self) -> bool:
        return getattr(getattr(self.model, "embeddings", None), "cls_token", None) is not None

    def _count_blocks(self) -> int:
        return (
            self.model.config.num_hidden_layers if self._has_cls() and hasattr(self.model, "layernorm") else 0
        )

    def _blocks(self, images: Tensor, n: int) -> tuple[Block, ...]:
        states = self.model(pixel_values=images, output_hidden_states=True).hidden_states[-n:]
        prefix = 1 + getattr(self.model.config, "num_register_tokens", 0)
        tokens = [self.model.layernorm(state) for state in states]
        return tuple((state[:, prefix:], state[:, 0]) for state in tokens)


def _from_timm(name: str) -> OtherBackbone:
    timm = _library("timm")
    options = {"pretrained": True, "num_classes": 0}
    try:
        try:
            # A vision transformer then takes images of any size, and resamples its positions to them.
            model = timm.create_model(name, dynamic_img_size=True, **options)
        except TypeError:  # other architectures take any size anyway, and do not know the option
            model = timm.create_model(name, **options)
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        raise _cannot_be_opened("timm", name, error, "timm.list_pretrained() has the names") from error
    stated = timm.data.resolve_model_data_config(model)
    constants = {"mean": list(stated["mean"]), "std": list(stated["std"])}
    return TimmBackbone(f"timm:{name}", model, constants)


def _from_transformers(name: str) -> OtherBackbone:
    transformers = _library("transformers")
    try:
        model, report = transformers.AutoModel.from_pretrained(name, output_loading_info=True)
    except (OSError, RuntimeError, ValueError) as error:
        advice = "give a folder with config.json and model.safetensors, or a name of the Hub"
        raise _cannot_be_opened("transformers", name, error, advice) from error
    missing = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise WeightsError(
            f"transformers:{name} has no weights for {len(missing)} tensors of its model, such as "
            f'"{missing[0]}", which would be random: give weights of the model that config.json describes'
        )
    return TransformersBackbone(f"transformers:{name}", model, _processor_constants(transformers, name))


def _processor_constants(transformers: Any, name: str) -> dict[str, list[float]] | None:
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError, ImportError):
        return None
    mean, std = (getattr(processor, constant, None) for constant in ("image_mean", "image_std"))
    return {"mean": list(mean), "std": list(std)} if mean and std else None


def _cannot_be_opened(library: str, name: str, error: Exception, advice: str) -> WeightsError:
    reason = " ".join(str(error).split())
    return WeightsError(
        f'{library} cannot open "{name}" ({reason}): {advice}; without a network, a folder on disk'
    )


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"{name}: names a model of {name}, which is not installed: pip install {name}"
        ) from error


LIBRARIES: dict[str, Callable[[str], OtherBackbone]] = {
    "timm": _from_timm,
    "transformers": _from_transformers,
}


def is_other_model(weights: str | None) -> bool:
    """Return whether ``--pretrained-weights`` names a model of another library."""
    return bool(weights) and weights.partition(":")[0] in LIBRARIES


def open_other_model(weights: str) -> OtherBackbone:
    """Return the model that ``timm:NAME`` or ``transformers:NAME`` names, with its weights.

    Raises:
        ConfigError: The library is not installed.
        WeightsError: There is no such model, or its weights cannot be read or fetched.
    """
    library, _, name = weights.partition(":")
    model = LIBRARIES[library](name)
    if model.normalisation is None:
        logger.warning(
            "%s does not say how its images were normalised: crops.mean and crops.std are taken", weights
        )
    return model


def refuse_other_models(weights: Sequence[str | None], what: str) -> None:
    """Stop where only a backbone of this project will do.

    Raises:
        ConfigError: One of ``weights`` names a model of another library.
    """
    for given in filter(is_other_model, weights):
        raise ConfigError(
            f"{what} looks inside the backbone, and {given} is a model of another library: give weights that "
            "the project reads itself (those of DINOv2 in timm's and transformers' layouts are among them)"
        )
