"""A model as a graph that runs without this project: ONNX, TorchScript and torch.export.

Each takes ``images [B, C, H, W]`` of one fixed size and any number B, and returns ``x_norm_clstoken [B, D]``
and ``x_norm_patchtokens [B, N, D]`` under these names. PyTorch's archives are put together in memory: its
writers end the whole process where a disk is full.
"""

import importlib.util
import io
import json
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from dinov2.errors import ConfigError
from dinov2.hub.export_layout import Normalisation
from dinov2.models.vision_transformer import DinoVisionTransformer

INPUT = "images"
OUTPUTS = ("x_norm_clstoken", "x_norm_patchtokens")
METADATA_FILE = "metadata.json"  # inside the archives of PyTorch
ONNX_INLINE_BYTES = 1 << 30  # a protobuf message ends at 2 GiB; larger weights go into a file beside it


class Features(nn.Module):
    """The part of a model that is exported."""

    def __init__(self, model: DinoVisionTransformer) -> None:
        super().__init__()
        self.model = model
        self.size = model.patch_embed.img_size

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the outputs named in :data:`OUTPUTS` for images ``[B, C, H, W]``."""
        # Refuses every other size: a trace would take 112 x 448 pixels for the positions of 224 x 224.
        images = images.expand(-1, -1, *self.size)
        features = self.model.forward_features(images)
        return {name: features[name] for name in OUTPUTS}


def metadata(model: DinoVisionTransformer, normalisation: Normalisation) -> dict[str, str]:
    """Return what a graph does not say about itself; values are JSON."""
    facts = {
        "image_size": list(model.patch_embed.img_size),
        "patch_size": model.patch_size,
        "num_register_tokens": model.num_register_tokens,
        "mean": normalisation.mean,
        "std": normalisation.std,
        "input": INPUT,
        "outputs": OUTPUTS,
    }
    return {name: json.dumps(fact) for name, fact in facts.items()}


def write_onnx(model: DinoVisionTransformer, path: Path, facts: dict[str, str]) -> None:
    """Write an ONNX file, with the weights in ``<path>.data`` if they are too large for it.

    Raises:
        ConfigError: A package is missing, or the weights are bfloat16.
    """
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"Export to ONNX needs the package {' and '.join(missing)}, which is not installed: "
            f'run "pip install {" ".join(missing)}".'
        )
    if model.cls_token.dtype == torch.bfloat16:
        raise ConfigError(
            "--dtype bfloat16 cannot be used with --to onnx, whose convolution has no such type in "
            "onnxruntime: use float16 or float32."
        )
    features, example = _prepared(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the exporter's own use of PyTorch
        program = torch.onnx.export(
            features,
            (example,),
            dynamo=True,
            input_names=[INPUT],
            output_names=list(OUTPUTS),
            dynamic_shapes={INPUT: {0: torch.export.Dim("batch")}},
            verbose=False,
        )
    program.model.metadata_props.update(facts)
    weight_bytes = sum(tensor.nbytes for tensor in model.state_dict().values())
    program.save(path, external_data=weight_bytes > ONNX_INLINE_BYTES)


def write_torchscript(model: DinoVisionTransformer, path: Path, facts: dict[str, str]) -> None:
    """Write a trace for ``torch.jit.load``."""
    features, example = _prepared(model)
    with warnings.catch_warnings():
        # TorchScript is deprecated, and the branches that the tracer warns of depend on the image size only.
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(features, (example,), strict=False)  # strict refuses a dict
        archive = io.BytesIO()
        torch.jit.save(traced, archive, _extra_files={METADATA_FILE: json.dumps(facts)})
    path.write_bytes(archive.getbuffer())


def write_exported_program(model: DinoVisionTransformer, path: Path, facts: dict[str, str]) -> None:
    """Write a ``.pt2`` file for ``torch.export.load``."""
    features, example = _prepared(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # about the exporter's own use of PyTorch
        program = torch.export.export(
            features, (example,), dynamic_shapes={INPUT: {0: torch.export.Dim("batch")}}
        )
        archive = io.BytesIO()
        torch.export.save(program, archive, extra_files={METADATA_FILE: json.dumps(facts)})
    path.write_bytes(archive.getbuffer())


def _prepared(model: DinoVisionTransformer) -> tuple[Features, Tensor]:
    """Return the module to export and images to follow through it."""
    features = Features(model).eval().requires_grad_(False)
    shape = (2, model.patch_embed.in_chans, *features.size)  # a batch of one would become a constant
    return features, torch.zeros(shape, dtype=model.cls_token.dtype)
