"""Files of trained aggregators."""

import pickle
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from dinov2.errors import OutputError, WeightsError
from dinov2.eval.slides.aggregators import recipe_of


@dataclass(frozen=True)
class TrainedAggregator:
    """An aggregator in evaluation mode, on the CPU, and what its outputs mean.

    Attributes:
        model: maps features (N, width) to :class:`~dinov2.eval.slides.aggregators.Aggregated`.
        aggregator: its name.
        width: D of the features.
        classes: names, in order; of two the second is the positive one, and there is one output.
        target: what was learned.
        encoder: what made the features, see :func:`~dinov2.eval.slides.bags.encoder_of`; empty if not known.
    """

    model: nn.Module
    aggregator: str
    width: int
    classes: list[str]
    target: str
    encoder: str = ""


def save_model(
    path: Path,
    model: nn.Module,
    aggregator: str,
    width: int,
    classes: list[str],
    target: str,
    encoder: str = "",
) -> None:
    """Write a trained aggregator for :func:`load_model`; arguments as of :class:`TrainedAggregator`.

    Raises:
        OutputError: the file cannot be written.
    """
    state = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    content = {
        "aggregator": aggregator,
        "width": width,
        "classes": classes,
        "target": target,
        "encoder": encoder,
        "model": state,
    }
    aside = path.with_suffix(".tmp")
    try:
        torch.save(content, aside)
        aside.replace(path)
    except (OSError, RuntimeError) as error:
        raise OutputError(
            f"the model {path} cannot be written ({error}): choose another --output-dir"
        ) from error


def load_model(path: str | Path) -> TrainedAggregator:
    """Read a trained aggregator.

    Raises:
        WeightsError: the file is missing or not of this kind.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        width, classes = content["width"], content["classes"]
        outputs = 1 if len(classes) == 2 else len(classes)
        model = recipe_of(content["aggregator"]).build(width, outputs)
        model.load_state_dict(content["model"])
        # Older files do not name the encoder.
        encoder = content.get("encoder", "")
        named = TrainedAggregator(
            model.eval(), content["aggregator"], width, classes, content["target"], encoder
        )
    except (
        OSError,
        EOFError,
        KeyError,
        TypeError,
        ValueError,
        RuntimeError,
        pickle.UnpicklingError,
    ) as error:
        # PyTorch advises to load what it refuses without its safeguards: no advice to pass on.
        refused = isinstance(error, pickle.UnpicklingError)
        reason = (
            "it holds more than tensors, or is no file of PyTorch" if refused else str(error).split("\n")[0]
        )
        raise WeightsError(
            f'"{path}" is not a trained aggregator ({reason}): give a model_fold_<n>.pt of '
            "python -m dinov2.eval.slides.train"
        ) from error
    return named
