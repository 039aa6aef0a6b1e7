"""Names of other projects: their own models, with random weights, give the same features as ours."""

import pytest
import timm
import torch
import transformers
from timm.layers import SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer

from dinov2.errors import WeightsError
from dinov2.models.conversion import flat_name, to_dinov2_names
from dinov2.models.pretrained import build_from_weights, load_backbone, open_weights
from tests.models.vits import refusal, tiny


def randomised(model):
    """Return a foreign model with weights far from any initial value, in evaluation mode.

    It may be built on the meta device, which spares the library's own, slow initial values.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            std = parameter[0].numel() ** -0.5 if parameter.ndim in (2, 4) else 0.5
            parameter.uniform_(-(3**0.5) * std, 3**0.5 * std, generator=generator)
    return model.eval()


def all_tokens(model, x):
    out = model.forward_features(x)
    tokens = [out["x_norm_clstoken"].unsqueeze(1), out["x_norm_regtokens"], out["x_norm_patchtokens"]]
    return torch.cat(tokens, dim=1)


def test_block_chunks_are_translated_in_both_directions():
    flat, chunked, back = tiny(), tiny(seed=1, block_chunks=2), tiny(seed=2)
    assert (
        flat_name("blocks.1.3.attn.qkv.bias")
        == "blocks.3.attn.qkv.bias"
        == flat_name("blocks.3.attn.qkv.bias")
    )
    x = torch.randn(1, 3, 28, 28)
    expected = flat(x)
    load_backbone(chunked, flat.state_dict(), allow_missing=())
    assert torch.equal(chunked(x), expected)
    load_backbone(back, chunked.state_dict(), allow_missing=())
    assert torch.equal(back(x), expected)


TIMM_VARIANTS = {
    "dinov2": {"init_values": 0.1},
    "no cls position": {"init_values": 0.1, "reg_tokens": 3, "no_embed_class": True},
    "positions of registers": {"init_values": 0.1, "reg_tokens": 3},
    "no qkv bias, no layer scale": {"qkv_bias": False},
}


@pytest.mark.parametrize("variant", TIMM_VARIANTS)
def test_timm_weights_give_timm_features(variant):
    options = TIMM_VARIANTS[variant]
    theirs = VisionTransformer(
        img_size=56, patch_size=14, embed_dim=24, depth=2, num_heads=2, num_classes=5, **options
    ).eval()
    compare_with_timm(theirs, options, ffn_layer="mlp")


def test_timm_swiglu_gives_timm_features():
    options = {"init_values": 0.1, "reg_tokens": 8, "no_embed_class": True}
    # Half of timm's hidden width is that of each SwiGLU arm: 24 * 5.34 = 128 = 2 * 64.
    theirs = VisionTransformer(
        img_size=56,
        patch_size=14,
        embed_dim=24,
        depth=2,
        num_heads=2,
        mlp_ratio=128 / 24,
        mlp_layer=SwiGLUPacked,
        act_layer=torch.nn.SiLU,
        **options,
    ).eval()
    compare_with_timm(theirs, options, ffn_layer="swiglufused")


def compare_with_timm(theirs, options, ffn_layer):
    randomised(theirs)
    ours = tiny(
        seed=1,
        img_size=56,
        patch_size=14,
        depth=2,
        ffn_layer=ffn_layer,
        qkv_bias=options.get("qkv_bias", True),
        init_values=options.get("init_values"),
        num_register_tokens=options.get("reg_tokens", 0),
    )
    report = load_backbone(ours, theirs.state_dict())
    assert list(report.missing) == ["mask_token"]
    x = torch.randn(2, 3, 56, 56)
    with torch.inference_mode():
        assert torch.allclose(all_tokens(ours, x), theirs.forward_features(x), atol=1e-5)


@pytest.mark.parametrize("swiglu", [False, True])
def test_transformers_with_registers_gives_its_features(swiglu, tmp_path):
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
        num_register_tokens=3,
        use_swiglu_ffn=swiglu,
    )
    theirs = randomised(transformers.Dinov2WithRegistersModel(config))
    options = {"num_register_tokens": 3, "ffn_layer": "swiglufused" if swiglu else "mlp"}
    theirs.save_pretrained(tmp_path)
    x = torch.randn(2, 3, 56, 56)
    with torch.inference_mode():
        expected = theirs(x).last_hidden_state
        for source in (str(tmp_path), theirs.state_dict()):
            ours = tiny(seed=1, img_size=56, patch_size=14, depth=2, **options)
            load_backbone(ours, source, allow_missing=())
            assert torch.allclose(all_tokens(ours, x), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("own", "others"),
    [
        ("mask_token", "masked_embed"),
        ("register_tokens", "reg_token"),
        ("blocks.0.norm1.bias", "blocks.1.0.norm1.bias"),
    ],
)
def test_two_tensors_do_not_become_one(own, others):
    """Chunks that number their blocks anew, or a file that mixes layouts, would lose tensors."""
    state = dict(tiny(num_register_tokens=2).state_dict())
    state[others] = state[own]
    assert "become the same parameters as others" in refusal(tiny(num_register_tokens=2), state)


def test_an_incomplete_attention_is_not_joined():
    state = {"embeddings.cls_token": torch.zeros(1, 1, 4)}
    state |= {
        f"encoder.layer.0.attention.attention.{part}.weight": torch.zeros(4, 4) for part in ("query", "key")
    }
    converted, _ = to_dinov2_names(state)
    assert set(converted) == {"cls_token", "blocks.0.attn.q.weight", "blocks.0.attn.k.weight"}


# Options of the published models as their cards state them, with two blocks; the sizes are the real ones.
SWIGLU = {"mlp_layer": SwiGLUPacked, "act_layer": torch.nn.SiLU, "init_values": 1e-5}
GIANT = {"patch_size": 14, "embed_dim": 1536, "num_heads": 24, "mlp_ratio": 2.66667 * 2, **SWIGLU}
VIRCHOW = {"patch_size": 14, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 5.3375, **SWIGLU}
PUBLISHED = {
    "UNI": {"patch_size": 16, "embed_dim": 1024, "num_heads": 16, "init_values": 1e-5},
    "UNI2-h": {**GIANT, "reg_tokens": 8, "no_embed_class": True},
    "Virchow": VIRCHOW,
    "Virchow2": {**VIRCHOW, "reg_tokens": 4},
    "H-optimus": {**GIANT, "reg_tokens": 4, "no_embed_class": True},
    "Prov-GigaPath": {**GIANT, "patch_size": 16},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes_give_timm_features_without_a_word_of_config(name):
    with torch.device("meta"):
        theirs = VisionTransformer(img_size=224, num_classes=0, depth=2, **PUBLISHED[name])
    state = randomised(theirs).state_dict()
    ours = build_from_weights(state)
    assert ours.register_tokens is None or ours.num_register_tokens == PUBLISHED[name]["reg_tokens"]
    x = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        torch.testing.assert_close(all_tokens(ours, x), theirs.forward_features(x), rtol=1e-4, atol=1e-4)


def all_of_uni():
    """MahmoodLab/UNI: timm.create_model("vit_large_patch16_224", init_values=1e-5, dynamic_img_size=True)"""
    with torch.device("meta"):
        return timm.create_model(
            "vit_large_patch16_224", init_values=1e-5, num_classes=0, dynamic_img_size=True
        )


def test_uni_is_recognised():
    state = {name: torch.zeros(()).expand(entry.shape) for name, entry in all_of_uni().state_dict().items()}
    weights = open_weights(state)
    assert (weights.layout, weights.looks_like) == ("timm", "UNI")
    assert weights.normalisation == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.mark.slow
def test_all_of_uni_gives_timm_features():
    """Two of its blocks are among the published shapes."""
    theirs = randomised(all_of_uni())
    ours, x = build_from_weights(theirs.state_dict()), torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        torch.testing.assert_close(all_tokens(ours, x), theirs.forward_features(x), rtol=1e-4, atol=1e-4)


def test_masks_change_what_a_student_with_uni_weights_sees():
    """The adapter of the forks ignored them, and with them half of the training signal."""
    theirs = randomised(VisionTransformer(img_size=64, depth=2, num_classes=0, **PUBLISHED["UNI"]))
    ours = build_from_weights(theirs.state_dict())
    x, masks = torch.randn(1, 3, 64, 64), torch.zeros(1, 16, dtype=torch.bool)
    masks[0, [2, 7]] = True
    with torch.inference_mode():
        plain, masked = all_tokens(ours, x)[0], ours.forward_features(x, masks)["x_norm_patchtokens"][0]
        # Masked patches lose their content: with other pixels there, nothing changes.
        other = x.clone()
        other[:, :, :16, 32:48] = 0.0  # patch 2
        torch.testing.assert_close(ours.forward_features(other, masks)["x_norm_patchtokens"][0], masked)
    changed = (masked - plain[1:]).abs().amax(dim=1)
    assert changed[2] > 0.1 and changed[7] > 0.1


def test_phikon_is_a_vit_of_transformers(tmp_path):
    """owkin/phikon: ViTModel of patch 16, its names those that the library writes."""
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96, image_size=64
    )
    theirs = randomised(transformers.ViTModel(config))
    theirs.save_pretrained(tmp_path)
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        expected = theirs(x).last_hidden_state
        for source in (
            str(tmp_path),
            theirs.state_dict(),
        ):  # the library's names on disk and in memory differ
            weights = open_weights(source)
            assert weights.layout == "transformers ViTModel"
            assert set(weights.unused.values()) == {"pooler"}
            ours = build_from_weights(weights, num_heads=2, norm_eps=1e-12)
            torch.testing.assert_close(all_tokens(ours, x), expected, rtol=1e-5, atol=1e-5)
    sizes = {"img_size": 64, "patch_size": 16, "depth": 2, "init_values": None}
    assert "norm eps is 1e-12 in the weights and 1e-06 in the model (student.norm_eps)" in refusal(
        tiny(**sizes), str(tmp_path)
    )
    report = load_backbone(tiny(**sizes, norm_eps=1e-12), str(tmp_path))
    assert list(report.missing) == ["mask_token"]


def test_dino_v1_and_ibot_checkpoints_load_with_their_heads_set_aside(tmp_path):
    """Training checkpoints of both: a student in `module.`, a teacher, options as a Namespace, the epoch."""
    import argparse

    source = tiny(init_values=None, qkv_bias=True)
    backbone = {name: tensor for name, tensor in source.state_dict().items() if name != "mask_token"}
    mask = {"masked_embed": source.mask_token.detach()}
    heads = {"head.mlp.0.weight": torch.zeros(4, 24), "head.last_layer.weight_g": torch.ones(8, 1)}
    for extra in ({}, mask):
        network = {f"backbone.{name}": tensor for name, tensor in (backbone | extra).items()} | heads
        content = {
            "student": {f"module.{name}": tensor * 2 for name, tensor in network.items()},
            "teacher": network,
            "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}},
            "epoch": 100,
            "args": argparse.Namespace(arch="vit_small", patch_size=16),
        }
        torch.save(content, tmp_path / "checkpoint.pth")
        model = tiny(seed=1, init_values=None)
        with torch.no_grad():
            model.mask_token.zero_()
        report = load_backbone(model, str(tmp_path / "checkpoint.pth"))
        assert torch.equal(model.norm.weight, source.norm.weight)
        assert report.layout == ("iBOT" if extra else "timm or DINO v1 (the same names)")
        assert report.missing == ({} if extra else {"mask_token": "zeros"})
        assert report.unused["teacher.head.last_layer.weight_g"] == "head"
        assert report.unused["optimizer.state.0.exp_avg"] == "tensor of another entry"
        if extra:
            assert torch.equal(model.mask_token, source.mask_token)
    student = load_backbone(model, str(tmp_path / "checkpoint.pth"), entry="student")
    assert torch.equal(model.norm.weight, 2 * source.norm.weight) and student.share == 1.0


def dinov3_of_transformers():
    config = transformers.DINOv3ViTConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=2)
    return transformers.DINOv3ViTModel(config)


@pytest.mark.parametrize(
    "build",
    [
        lambda: timm.create_model("vit_small_patch16_dinov3", depth=1),
        lambda: timm.create_model("vit_small_patch16_dinov3_qkvb", depth=1),
        dinov3_of_transformers,
    ],
)
def test_dinov3_is_refused_with_the_reason(build, tmp_path):
    theirs = build()
    assert "RoPE" in refusal(tiny(), theirs.state_dict())
    if hasattr(theirs, "save_pretrained"):
        theirs.save_pretrained(tmp_path)
        assert "RoPE" in refusal(tiny(), str(tmp_path))


def test_another_activation_than_gelu_is_refused(tmp_path):
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=2, hidden_act="quick_gelu", image_size=64
    )
    transformers.ViTModel(config).save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match='the activation "quick_gelu"'):
        open_weights(str(tmp_path))
