"""ONNX, TorchScript and torch.export, run by their own runtimes without this project's model."""

import json
import subprocess
import sys

import pytest
import torch

from dinov2.errors import ConfigError, WeightsError
from dinov2.hub import export, export_graphs
from dinov2.hub.export_graphs import METADATA_FILE, OUTPUTS
from dinov2.models.pretrained import build_from_weights, open_weights
from tests.hub.variants import HEADS, SIZE, VARIANTS, saved, variant
from tests.models.test_real_vits14 import TOLERANCE, tile

FILES = {"onnx": "graph.onnx", "torchscript": "graph.pt", "torch.export": "graph.pt2"}
BATCHES = (1, 2, 5)


def exported(source, to, tmp_path, *options):
    path = tmp_path / FILES[to]
    export.main(["--checkpoint", str(source), "--to", to, "--output", str(path), *options])
    return path


def opened(to, path):
    """Return the graph as a function from images to named outputs, and its metadata."""
    if to == "onnx":
        return opened_onnx(path)
    extra = {METADATA_FILE: ""}
    if to == "torchscript":
        graph = torch.jit.load(path, _extra_files=extra)
    else:
        graph = torch.export.load(path, extra_files=extra).module()
    return graph, json.loads(extra[METADATA_FILE])


def opened_onnx(path):
    onnxruntime = pytest.importorskip("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options)
    names = [output.name for output in session.get_outputs()]

    def run(images):
        return dict(
            zip(names, map(torch.from_numpy, session.run(None, {"images": images.numpy()})), strict=True)
        )

    return run, session.get_modelmeta().custom_metadata_map


def tiles(size, count):
    """One tile in several variants, so that no two images of a batch are alike."""
    return torch.cat([tile(size) * (1 + 0.1 * i) for i in range(count)])


def assert_same(graph, model, size, tolerance=TOLERANCE):
    for count in BATCHES:
        x = tiles(size, count).to(model.cls_token.dtype)
        with torch.inference_mode():
            expected, found = model.forward_features(x), graph(x)
        assert set(found) == set(OUTPUTS)
        for name in OUTPUTS:
            assert found[name].shape == expected[name].shape
            assert (found[name] - expected[name]).abs().max() < tolerance


@pytest.mark.parametrize(
    "to",
    [
        pytest.param("onnx", marks=pytest.mark.slow),
        "torchscript",
        pytest.param("torch.export", marks=pytest.mark.slow),
    ],
)
def test_the_real_weights(to, real_vits14, tmp_path):
    path = exported(
        real_vits14,
        to,
        tmp_path,
        "--img-size",
        "98",
        "--mean",
        "0.7",
        "0.6",
        "0.5",
        "--std",
        "0.2",
        "0.3",
        "0.4",
    )
    graph, facts = opened(to, path)
    assert_same(graph, build_from_weights(str(real_vits14)).eval(), 98)
    facts = {name: json.loads(fact) for name, fact in facts.items()}
    assert facts["image_size"] == [98, 98] and facts["mean"] == [0.7, 0.6, 0.5]
    assert facts["std"] == [0.2, 0.3, 0.4] and facts["outputs"] == list(OUTPUTS)


@pytest.fixture(scope="module")
def one_block(tmp_path_factory):
    """The folder of all three graphs of one model; following a graph takes time with every block."""
    folder = tmp_path_factory.mktemp("graphs")
    weights = saved(variant(depth=1), folder / "weights.pth")
    for to in FILES:
        exported(weights, to, folder, "--num-heads", str(HEADS))
    return folder


@pytest.mark.parametrize("to", FILES)
@pytest.mark.parametrize(
    ("name", "depth"), [("chunked", 2), ("SwiGLU, registers, no LayerScale, no ffn bias", 1)]
)
def test_variants(to, name, depth, tmp_path):
    model = variant(**VARIANTS[name], depth=depth)
    path = exported(saved(model, tmp_path / "weights.pth"), to, tmp_path, "--num-heads", str(HEADS))
    assert_same(opened(to, path)[0], model, SIZE)


@pytest.mark.parametrize("to", FILES)
def test_images_of_another_size_are_refused(to, one_block):
    """Also those with as many patches as the positions are laid out for."""
    graph, _ = opened(to, one_block / FILES[to])
    for height, width in ((SIZE // 2, SIZE * 2), (SIZE, SIZE + 14)):
        with pytest.raises(Exception, match="(?i)dimension|size|guard|shape"):
            graph(torch.zeros(2, 3, height, width))


@pytest.mark.parametrize(
    ("to", "dtype"),
    [
        pytest.param("onnx", "float16", marks=pytest.mark.slow),
        ("torchscript", "bfloat16"),
        ("torch.export", "float16"),
    ],
)
def test_half_precision(to, dtype, tmp_path):
    model = variant(depth=1)
    options = ("--num-heads", str(HEADS), "--dtype", dtype)
    path = exported(saved(model, tmp_path / "weights.pth"), to, tmp_path, *options)
    graph, _ = opened(to, path)
    x = tiles(SIZE, 2)
    with torch.inference_mode():
        found, expected = graph(x.to(getattr(torch, dtype))), model.forward_features(x)
    assert {tensor.dtype for tensor in found.values()} == {getattr(torch, dtype)}
    assert all((found[name].float() - expected[name]).abs().max() < 0.1 for name in OUTPUTS)


def test_onnx_has_no_bfloat16(tmp_path):
    weights = saved(variant(), tmp_path / "weights.pth")
    with pytest.raises(ConfigError, match="bfloat16 cannot be used.*use float16 or float32"):
        exported(weights, "onnx", tmp_path, "--num-heads", str(HEADS), "--dtype", "bfloat16")
    assert [path.name for path in tmp_path.iterdir()] == ["weights.pth"]


@pytest.mark.slow
def test_large_onnx_weights_go_beside_the_graph(tmp_path, monkeypatch):
    monkeypatch.setattr(export_graphs, "ONNX_INLINE_BYTES", 1000)
    model = variant(depth=1)
    path = exported(saved(model, tmp_path / "weights.pth"), "onnx", tmp_path, "--num-heads", str(HEADS))
    beside = tmp_path / "graph.onnx.data"
    assert beside.stat().st_size > path.stat().st_size / 2
    assert_same(opened("onnx", path)[0], model, SIZE)
    with pytest.raises(Exception, match="graph.onnx.data exists already"):
        path.unlink()
        exported(tmp_path / "weights.pth", "onnx", tmp_path, "--num-heads", str(HEADS))


def test_a_missing_exporter_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(
        export_graphs.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else name
    )
    weights = saved(variant(), tmp_path / "weights.pth")
    with pytest.raises(ConfigError, match='needs the package onnxscript.*run "pip install onnxscript"'):
        exported(weights, "onnx", tmp_path, "--num-heads", str(HEADS))


@pytest.mark.slow
def test_graphs_run_where_this_project_is_not_installed(one_block):
    code = f"""
import sys
sys.modules["dinov2"] = None
import torch
for graph in (torch.jit.load("graph.pt"), torch.export.load("graph.pt2").module()):
    print(*graph(torch.ones(3, 3, {SIZE}, {SIZE}))["x_norm_clstoken"].shape)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=one_block, capture_output=True, text=True)
    assert result.stdout == "3 48\n3 48\n", result.stderr


KINDS = {
    "onnx": "an ONNX graph",
    "torchscript": "a TorchScript program",
    "torch.export": "a graph of torch.export",
}


@pytest.mark.parametrize("to", FILES)
def test_the_loader_says_what_a_graph_is(to, one_block):
    with pytest.raises(WeightsError, match=f"is {KINDS[to]}"):
        open_weights(str(one_block / FILES[to]))
