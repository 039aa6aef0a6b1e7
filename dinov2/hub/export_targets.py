"""What can be exported to, and the writing of it; the command line is :mod:`dinov2.hub.export`."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dinov2.errors import ConfigError
from dinov2.hub import export_graphs as graphs
from dinov2.hub.export_files import write_aside, write_json, write_pickle, write_safetensors
from dinov2.hub.export_layout import Layout, Normalisation, flat_weights
from dinov2.hub.export_timm import timm_layout
from dinov2.hub.export_transformers import transformers_layout
from dinov2.models.companions import IMAGENET
from dinov2.models.vision_transformer import DinoVisionTransformer

WEIGHTS_FILE = "model.safetensors"  # where timm and transformers look

Writer = Callable[[DinoVisionTransformer, Normalisation, Path], list[str]]


@dataclass(frozen=True)
class Target:
    """One kind of export.

    Attributes:
        suffix: Of the file; None if it is a folder of ``files``.
        write: Writes a model to a path and returns remarks.
        snippet: Two lines that load it.
        files: Names of the files in the folder, or what follows the name of the file.
    """

    suffix: str | None
    write: Writer
    snippet: str
    files: tuple[str, ...] = ("",)


def _write_state(
    write: Callable[..., None], model: DinoVisionTransformer, normalisation: Normalisation, path: Path
) -> list[str]:
    write(flat_weights(model), path)
    return []


def _write_layout(
    layout_of: Callable[..., Layout], model: DinoVisionTransformer, normalisation: Normalisation, path: Path
) -> list[str]:
    layout = layout_of(model, normalisation)
    path.mkdir(exist_ok=True)
    write_safetensors(layout.weights, path / WEIGHTS_FILE)
    for name, content in layout.files.items():
        write_json(content, path / name)
    return layout.notes


def _write_graph(
    write: Callable[..., None], model: DinoVisionTransformer, normalisation: Normalisation, path: Path
) -> list[str]:
    write(model, path, graphs.metadata(model, normalisation))
    return []


OWN = 'from dinov2.models.pretrained import build_from_weights\nmodel = build_from_weights("{path}"{options})'
TARGETS = {
    "dinov2": Target(".pth", partial(_write_state, write_pickle), OWN),
    "safetensors": Target(".safetensors", partial(_write_state, write_safetensors), OWN),
    "timm": Target(
        None,
        partial(_write_layout, timm_layout),
        'import timm\nmodel = timm.create_model("local-dir:{path}", pretrained=True).eval()',
        (WEIGHTS_FILE, "config.json"),
    ),
    "transformers": Target(
        None,
        partial(_write_layout, transformers_layout),
        'from transformers import AutoModel\nmodel = AutoModel.from_pretrained("{path}").eval()',
        (WEIGHTS_FILE, "config.json", "preprocessor_config.json"),
    ),
    "onnx": Target(
        ".onnx",
        partial(_write_graph, graphs.write_onnx),
        "import onnxruntime\n"
        'cls_token, patch_tokens = onnxruntime.InferenceSession("{path}").run(None, {{"images": images}})',
        ("", ".data"),
    ),
    "torchscript": Target(
        ".pt",
        partial(_write_graph, graphs.write_torchscript),
        'import torch\ncls_token = torch.jit.load("{path}")(images)["x_norm_clstoken"]',
    ),
    "torch.export": Target(
        ".pt2",
        partial(_write_graph, graphs.write_exported_program),
        'import torch\ncls_token = torch.export.load("{path}").module()(images)["x_norm_clstoken"]',
    ),
}


def export(
    model: DinoVisionTransformer,
    to: str,
    output: str | Path,
    *,
    normalisation: Normalisation = Normalisation(*IMAGENET),  # noqa: B008
    force: bool = False,
) -> tuple[list[Path], list[str]]:
    """Write a backbone for another program.

    Args:
        model: The backbone, in the precision to write.
        to: One of :data:`TARGETS`.
        output: The file, or for timm and transformers the folder.
        normalisation: What images have to be normalised with, noted where the target has a place for it.
        force: Replace files that exist.

    Returns:
        The files written, and remarks on what the target represents otherwise.

    Raises:
        ConfigError: ``output`` has another suffix than the target.
        OutputError: A file exists already or cannot be written.
        WeightsError: The target cannot represent the model.
    """
    target, output = TARGETS[to], Path(output).expanduser()
    check_output(to, output)
    notes = []
    if target.suffix is None:
        folder, names = output, target.files
    else:
        folder, names = output.parent, tuple(output.name + end for end in target.files)

    def write(aside: Path) -> None:
        path = aside if target.suffix is None else aside / output.name
        notes.extend(target.write(model.eval(), normalisation, path))

    return write_aside(folder, names, write, force=force), notes


def check_output(to: str, output: Path) -> None:
    """Raise unless ``output`` looks like the kind of file or folder that the target writes."""
    suffixes = [target.suffix for target in TARGETS.values() if target.suffix]
    suffix = TARGETS[to].suffix
    if suffix is None and output.suffix in suffixes:
        raise ConfigError(
            f"--output {output} looks like a file, but --to {to} writes a folder: name a folder."
        )
    if suffix is not None and output.suffix != suffix:
        raise ConfigError(f"--output {output} must end in {suffix} for --to {to}: name such a file.")
