"""The backbone against recorded outputs, timm and transformers, and against itself in its other forms."""

import math
from functools import partial

import pytest
import timm.models.vision_transformer as timm_vit
import torch
from torch import nn
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from dinov2.errors import ConfigError
from dinov2.layers import MemEffAttention, NestedTensorBlock, SwiGLUFFNFused
from dinov2.models import vision_transformer as vits
from dinov2.models.vision_transformer import BlockChunk, DinoVisionTransformer, named_apply
from tests.conftest import load_golden_json, load_golden_tensors

RECORD = load_golden_json("vit_cases.json")
CASES = RECORD["cases"]
INPUTS = load_golden_tensors(RECORD["inputs"])
TOLERANCE = {"rtol": RECORD["rtol"], "atol": RECORD["atol"]}
FEATURES = ("x_norm_clstoken", "x_norm_regtokens", "x_norm_patchtokens", "x_prenorm")
RELEASED_BLOCK = partial(NestedTensorBlock, attn_class=MemEffAttention)


def _load_case(name):
    """Return the model of a recorded case in evaluation mode, and the tensors of its file."""
    case = CASES[name]
    tensors = load_golden_tensors(case["file"])
    source = load_golden_tensors(CASES[case["weights_from"]]["file"]) if case["weights_from"] else tensors
    model = DinoVisionTransformer(**case["ctor"], block_fn=RELEASED_BLOCK).eval()
    model.load_state_dict({key[6:]: t for key, t in source.items() if key.startswith("state.")})
    return model, tensors


def _small(**options):
    """A 4-block model whose every parameter is random, so that a skipped term shows."""
    torch.manual_seed(0)
    sizes = {"img_size": 56, "patch_size": 14, "embed_dim": 48, "depth": 4, "num_heads": 3}
    sizes |= {"init_values": 1.0, "block_chunks": 0, "block_fn": RELEASED_BLOCK}
    model = DinoVisionTransformer(**{**sizes, **options})
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def _images(*sizes):
    torch.manual_seed(1)
    return [torch.randn(batch, 3, height, width) for batch, height, width in sizes]


class TestRecorded:
    @pytest.mark.parametrize("name", CASES)
    @torch.no_grad()
    def test_features(self, name):
        model, want = _load_case(name)
        runs = [run for run in CASES[name]["runs"] if run["kind"] == "features"]
        assert runs
        for run in runs:
            masks = None if run["mask"] is None else INPUTS[run["mask"]]
            got = model.forward_features(INPUTS[run["x"]], masks)
            assert set(got) == {*FEATURES, "masks"} and got["masks"] is masks
            for entry in FEATURES:
                torch.testing.assert_close(got[entry], want[f"out.{run['id']}.{entry}"], **TOLERANCE)

    @pytest.mark.parametrize("name", CASES)
    @torch.no_grad()
    def test_call(self, name):
        model, want = _load_case(name)
        for run in CASES[name]["runs"]:
            if run["kind"] == "call":
                (key,) = (key for key in want if key.startswith(f"out.{run['id']}"))
                torch.testing.assert_close(model(INPUTS[run["x"]]), want[key], **TOLERANCE)

    @pytest.mark.parametrize("name", [name for name, case in CASES.items() if case["weights_from"] is None])
    @torch.no_grad()
    def test_list(self, name):
        model, want = _load_case(name)
        runs = [run for run in CASES[name]["runs"] if run["kind"] == "list"]
        assert runs
        for run in runs:
            masks = [None if mask is None else INPUTS[mask] for mask in run["masks"]]
            outputs = model([INPUTS[x] for x in run["xs"]], masks=masks, is_training=True)
            assert len(outputs) == len(run["xs"])
            for i, (got, mask) in enumerate(zip(outputs, masks, strict=True)):
                assert got["masks"] is mask
                for entry in FEATURES:
                    torch.testing.assert_close(got[entry], want[f"out.{run['id']}.{i}.{entry}"], **TOLERANCE)

    @pytest.mark.parametrize("name", CASES)
    @torch.no_grad()
    def test_intermediate_layers(self, name):
        model, want = _load_case(name)
        for run in CASES[name]["runs"]:
            if run["kind"] != "intermediate":
                continue
            outputs = model.get_intermediate_layers(INPUTS[run["x"]], **run["args"])
            assert isinstance(outputs, tuple) and len(outputs) == run["count"]
            for i, out in enumerate(outputs):
                patches, cls = out if run["args"]["return_class_token"] else (out, None)
                torch.testing.assert_close(patches, want[f"out.{run['id']}.{i}.patch"], **TOLERANCE)
                assert (cls is None) == (f"out.{run['id']}.{i}.cls" not in want)
                if cls is not None:
                    torch.testing.assert_close(cls, want[f"out.{run['id']}.{i}.cls"], **TOLERANCE)

    @pytest.mark.parametrize("record", load_golden_json("vit_keys.json").values(), ids=lambda r: r["arch"])
    def test_names_shapes_and_order_of_parameters(self, record):
        with torch.device("meta"):
            model = getattr(vits, record["arch"])(**record["kwargs"])
        got = [(name, list(tensor.shape)) for name, tensor in model.state_dict().items()]
        assert got == list(record["parameters"].items())
        assert model.embed_dim == model.num_features == record["embed_dim"]
        assert (model.num_heads, model.n_blocks) == (record["num_heads"], record["n_blocks"])


@pytest.mark.parametrize(
    ("factory", "ffn_layer", "parameters", "entries"),
    [
        (vits.vit_small, "mlp", 22_056_576, 175),
        (vits.vit_base, "mlp", 86_580_480, 175),
        (vits.vit_large, "mlp", 304_368_640, 343),
        (vits.vit_giant2, "swiglufused", 1_136_480_768, 567),
    ],
)
def test_parameter_counts_of_the_released_models(factory, ffn_layer, parameters, entries):
    options = {"img_size": 518, "patch_size": 14, "init_values": 1.0, "block_chunks": 0}
    with torch.device("meta"):
        plain = factory(**options, ffn_layer=ffn_layer)
        registers = factory(**options, ffn_layer=ffn_layer, num_register_tokens=4)
    counts = [sum(p.numel() for p in model.parameters()) for model in (plain, registers)]
    assert counts == [parameters, parameters + 4 * plain.embed_dim]
    assert [len(model.state_dict()) for model in (plain, registers)] == [entries, entries + 1]


def test_tiny_factory_and_overridden_sizes():
    tiny = vits.vit_tiny(patch_size=14, img_size=28)
    assert (tiny.embed_dim, tiny.n_blocks, tiny.num_heads) == (192, 12, 3)
    assert isinstance(tiny.blocks[0][0].attn, MemEffAttention)
    assert vits.vit_tiny(img_size=32, embed_dim=96, depth=2).embed_dim == 96


class TestIndependentImplementations:
    @pytest.mark.parametrize("registers", [0, 4])
    @torch.no_grad()
    def test_timm(self, registers):
        ours = _small(num_register_tokens=registers).eval()
        theirs = timm_vit.VisionTransformer(
            img_size=56,
            patch_size=14,
            embed_dim=48,
            depth=4,
            num_heads=3,
            init_values=1.0,
            reg_tokens=registers,
            no_embed_class=True,
            num_classes=0,
        ).eval()
        state = ours.state_dict()
        del state["mask_token"]
        # timm gives positions to patches only and expects the cls token's to be part of that token.
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = state["pos_embed"][:, 1:]
        if registers:
            state["reg_token"] = state.pop("register_tokens")
        theirs.load_state_dict(state)
        (x,) = _images((2, 56, 56))
        want = theirs.forward_features(x)
        got = ours.forward_features(x)
        torch.testing.assert_close(got["x_norm_clstoken"], want[:, 0], rtol=0, atol=1e-4)
        torch.testing.assert_close(got["x_norm_patchtokens"], want[:, 1 + registers :], rtol=0, atol=1e-4)
        (got_map,) = ours.get_intermediate_layers(x, n=[1], reshape=True)
        (want_map,) = theirs.get_intermediate_layers(x, n=[1], reshape=True, norm=True)
        torch.testing.assert_close(got_map, want_map, rtol=0, atol=1e-4)

    @pytest.mark.parametrize("registers", [0, 4])
    @pytest.mark.parametrize("masked", [False, True])
    @torch.no_grad()
    def test_transformers(self, registers, masked):
        ours = _small(num_register_tokens=registers).eval()
        config = Dinov2WithRegistersConfig(
            hidden_size=48,
            num_hidden_layers=4,
            num_attention_heads=3,
            image_size=56,
            patch_size=14,
            num_register_tokens=registers,
            attn_implementation="eager",
        )
        theirs = Dinov2WithRegistersModel(config).eval()
        theirs.load_state_dict(_transformers_state(ours))
        (x,) = _images((2, 56, 56))
        masks = torch.rand(2, 16) < 0.5 if masked else None
        # That class cannot take masks; its embedding can.
        tokens = theirs.embeddings(x, bool_masked_pos=masks)
        for layer in theirs.encoder.layer:
            tokens = layer(tokens)
        want = theirs.layernorm(tokens)
        got = ours.forward_features(x, masks)
        torch.testing.assert_close(got["x_norm_clstoken"], want[:, 0], rtol=0, atol=1e-4)
        torch.testing.assert_close(got["x_norm_regtokens"], want[:, 1 : 1 + registers], rtol=0, atol=1e-4)
        torch.testing.assert_close(got["x_norm_patchtokens"], want[:, 1 + registers :], rtol=0, atol=1e-4)


def _transformers_state(model):
    renamed = {
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "cls_token": "embeddings.cls_token",
        "mask_token": "embeddings.mask_token",
        "register_tokens": "embeddings.register_tokens",
        "blocks.": "encoder.layer.",
        "attn.proj": "attention.o_proj",
        "ls1.gamma": "layer_scale1.lambda1",
        "ls2.gamma": "layer_scale2.lambda1",
    }
    state = {}
    for name, tensor in model.state_dict().items():
        name = f"layernorm.{name[5:]}" if name.startswith("norm.") else name
        for ours, theirs in renamed.items():
            name = name.replace(ours, theirs)
        if "attn.qkv" in name:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                state[name.replace("attn.qkv", f"attention.{letter}_proj")] = part
        else:
            state[name] = tensor
    if model.register_tokens is None:
        state["embeddings.register_tokens"] = torch.zeros(1, 0, model.embed_dim)
    return state


class TestList:
    SIZES = ((2, 56, 56), (3, 28, 42), (1, 28, 28))

    def _assert_equal(self, listed, separate):
        for got, want in zip(listed, separate, strict=True):
            for entry in FEATURES:
                torch.testing.assert_close(got[entry], want[entry], rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("block_chunks", [0, 2])
    @pytest.mark.parametrize("block_fn", [NestedTensorBlock, RELEASED_BLOCK])
    def test_equals_separate_calls_in_training(self, block_chunks, block_fn):
        model = _small(num_register_tokens=2, block_chunks=block_chunks, block_fn=block_fn)
        images = _images(*self.SIZES)
        masks = [torch.rand(2, 16) < 0.5, None, torch.rand(1, 4) < 0.5]
        separate = [model.forward_features(x, m) for x, m in zip(images, masks, strict=True)]
        self._assert_equal(model(images, masks=masks, is_training=True), separate)
        torch.testing.assert_close(model(images)[1], model(images[1]), rtol=1e-4, atol=1e-5)

    def test_gradients_equal_those_of_separate_calls(self):
        model = _small()
        images = _images(*self.SIZES)

        def gradients(outputs):
            loss = sum(out["x_norm_patchtokens"].pow(3).mean() for out in outputs)
            return torch.autograd.grad(loss, [p for n, p in model.named_parameters() if n != "mask_token"])

        wants = gradients([model.forward_features(x) for x in images])
        for got, want in zip(gradients(model.forward_features(images)), wants, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)

    def test_linear_layers_run_once(self):
        model = _small().eval()
        calls = []
        model.blocks[0].attn.qkv.register_forward_hook(lambda _, inputs, __: calls.append(inputs[0].shape))
        model.forward_features(_images(*self.SIZES))
        assert calls == [(1, 2 * 17 + 3 * 7 + 1 * 5, 48)]


@pytest.mark.parametrize("registers", [0, 2])
def test_chunked_equals_flat(registers):
    flat = _small(num_register_tokens=registers).eval()
    chunked = _small(num_register_tokens=registers, block_chunks=2).eval()
    names = {f"blocks.{i}.": f"blocks.{i // 2}.{i}." for i in range(4)}
    state = {}
    for name, tensor in flat.state_dict().items():
        prefix = ".".join(name.split(".")[:2]) + "."
        state[name.replace(prefix, names.get(prefix, prefix), 1)] = tensor
    chunked.load_state_dict(state)
    assert chunked.chunked_blocks and not flat.chunked_blocks
    assert all(isinstance(chunk, BlockChunk) for chunk in chunked.blocks)
    (x,) = _images((2, 56, 56))
    assert torch.equal(flat(x), chunked(x))
    for n in (3, [0, 3]):
        wants = flat.get_intermediate_layers(x, n)
        assert all(map(torch.equal, chunked.get_intermediate_layers(x, n), wants))


def test_default_is_one_chunk():
    assert "blocks.0.11.norm1.weight" in DinoVisionTransformer(img_size=32, embed_dim=48).state_dict()


@pytest.mark.parametrize(("depth", "chunks"), [(12, 5), (4, 8)])
def test_chunks_that_do_not_divide_the_depth_are_refused(depth, chunks):
    with pytest.raises(ConfigError, match=f"block_chunks {chunks} does not divide the depth of {depth}"):
        DinoVisionTransformer(img_size=28, patch_size=14, embed_dim=48, depth=depth, block_chunks=chunks)


class TestTokens:
    def test_order_positions_and_masks(self):
        model = _small(num_register_tokens=2)
        (x,) = _images((2, 56, 56))
        masks = torch.zeros(2, 16, dtype=torch.bool)
        masks[1, 5] = True
        tokens = model.prepare_tokens_with_masks(x, masks)
        positions = model.pos_embed[0]
        assert tokens.shape == (2, 1 + 2 + 16, 48)
        torch.testing.assert_close(tokens[1, 0], model.cls_token[0, 0] + positions[0])
        torch.testing.assert_close(tokens[:, 1:3], model.register_tokens.expand(2, -1, -1))
        torch.testing.assert_close(tokens[1, 3 + 5], model.mask_token[0] + positions[1 + 5])
        torch.testing.assert_close(tokens[0, 3 + 5], model.patch_embed(x)[0, 5] + positions[1 + 5])

    def test_masks_hide_the_pixels_and_nothing_else_does(self):
        model = _small().eval()
        (x,) = _images((2, 56, 56))
        masks = torch.zeros(2, 16, dtype=torch.bool)
        masks[:, 0] = True
        altered = x.clone()
        altered[:, :, :14, :14] += 1
        entry = "x_norm_patchtokens"
        hidden = [model.forward_features(image, masks)[entry] for image in (x, altered)]
        shown = [model.forward_features(image)[entry] for image in (x, altered)]
        assert torch.equal(*hidden)
        assert not torch.allclose(*shown, atol=1e-3) and not torch.allclose(hidden[0], shown[0], atol=1e-3)

    def test_float_masks_are_refused(self):
        with pytest.raises(TypeError, match="masks must be boolean, not torch.float32"):
            _small().forward_features(*_images((2, 56, 56)), torch.zeros(2, 16))

    def test_images_that_do_not_divide_are_refused(self):
        with pytest.raises(ConfigError, match="96 x 98 pixels"):
            _small()(*_images((1, 96, 98)))


class TestPositions:
    @pytest.mark.parametrize("offset", [0.0, 0.1])
    @pytest.mark.parametrize("pixels", [546, 602, 1092])
    def test_grids_beyond_the_stored_37(self, offset, pixels):
        options = {"embed_dim": 8, "depth": 1, "num_heads": 1, "img_size": 518, "interpolate_offset": offset}
        model = _small(**options)
        cells = pixels // 14
        tokens = torch.empty(1, 1 + cells * cells, 8)
        assert model.interpolate_pos_encoding(tokens, pixels, pixels).shape == tokens.shape

    def test_first_size_is_the_height(self):
        model = _small(interpolate_offset=0)
        model.pos_embed.data[:, 1:] = torch.arange(4.0).repeat_interleave(4)[None, :, None]  # the row number
        grid = model.interpolate_pos_encoding(torch.empty(1, 1 + 2 * 6, 48), 28, 84)[0, 1:, 0].unflatten(
            0, (2, 6)
        )
        assert torch.allclose(grid, grid[:, :1].expand(2, 6)) and grid[1, 0] > grid[0, 0] + 1

    def test_stored_grid_is_returned_as_it_is(self):
        model = _small()
        assert model.interpolate_pos_encoding(torch.empty(1, 17, 48).bfloat16(), 56, 56) is model.pos_embed

    def test_resized_take_the_dtype_of_the_tokens(self):
        positions = _small().interpolate_pos_encoding(torch.empty(1, 5, 48).bfloat16(), 28, 28)
        assert positions.dtype == torch.bfloat16


class TestIntermediateLayers:
    @pytest.mark.parametrize("registers", [0, 4])
    def test_neither_cls_nor_registers_among_the_patches(self, registers):
        model = _small(num_register_tokens=registers).eval()
        (x,) = _images((2, 28, 56))
        features = model.forward_features(x)
        ((patches, cls),) = model.get_intermediate_layers(x, return_class_token=True)
        torch.testing.assert_close(patches, features["x_norm_patchtokens"])
        torch.testing.assert_close(cls, features["x_norm_clstoken"])
        (maps,) = model.get_intermediate_layers(x, reshape=True)
        assert maps.shape == (2, 48, 2, 4) and maps.is_contiguous()
        torch.testing.assert_close(maps[:, :, 1, 2], patches[:, 1 * 4 + 2])

    def test_block_order_and_missing_blocks(self):
        model = _small().eval()
        (x,) = _images((1, 56, 56))
        first, last = model.get_intermediate_layers(x, n=[3, 0])
        assert torch.equal(last, model.get_intermediate_layers(x)[0]) and not torch.equal(first, last)
        for n in ([4], [0, 9], 5):
            with pytest.raises(AssertionError, match="blocks exist"):
                model.get_intermediate_layers(x, n=n)


class TestStochasticDepth:
    def test_rates(self):
        growing = _small(drop_path_rate=0.3)
        assert [block.sample_drop_ratio for block in growing.blocks] == pytest.approx([0.0, 0.1, 0.2, 0.3])
        for uniform in (True, 1):
            model = _small(drop_path_rate=0.3, drop_path_uniform=uniform)
            assert [block.sample_drop_ratio for block in model.blocks] == [0.3] * 4

    @pytest.mark.parametrize("as_list", [False, True])
    def test_expectation_is_preserved(self, as_list):
        # The second branch sees what the first one added; a small gain makes that negligible.
        model = _small(depth=1, drop_path_rate=0.5, drop_path_uniform=True, init_values=1e-3)
        for scale in (model.blocks[0].ls1, model.blocks[0].ls2):
            nn.init.constant_(scale.gamma, 1e-3)
        (x,) = _images((1, 28, 28))
        x = x.expand(200, -1, -1, -1)
        torch.manual_seed(0)
        with torch.no_grad():
            start = model.prepare_tokens_with_masks(x[:1])
            trained = model.forward_features([x, x])[1] if as_list else model.forward_features(x)
            exact = model.eval().forward_features(x[:1])["x_prenorm"] - start
        added = trained["x_prenorm"] - start
        torch.testing.assert_close(added.mean(0, keepdim=True), exact, rtol=0.02, atol=2e-5)
        assert added.std(0).max() > 10 * (added.mean(0, keepdim=True) - exact).abs().max()


class TestInitialisation:
    def test_distributions(self):
        torch.manual_seed(0)
        model = DinoVisionTransformer(
            img_size=224, embed_dim=192, depth=2, num_heads=3, num_register_tokens=4, init_values=1e-5
        )
        stds = {"pos_embed": 0.02, "cls_token": 1e-6, "register_tokens": 1e-6}
        for name, std in stds.items():
            assert model.get_parameter(name).std().item() == pytest.approx(std, rel=0.15), name
        assert not model.mask_token.any()
        for module in model.modules():
            if isinstance(module, nn.Linear):
                assert module.weight.std().item() == pytest.approx(0.02, rel=0.05)
                assert not module.bias.any()
            if isinstance(module, nn.LayerNorm):
                assert module.eps == 1e-6 and module.weight.eq(1).all() and not module.bias.any()
        assert model.blocks[0][0].ls1.gamma.eq(1e-5).all()
        bound = 1 / math.sqrt(3 * 16 * 16)  # torch's default for a convolution
        assert 0.95 * bound < model.patch_embed.proj.weight.abs().max() <= bound

    def test_layer_scale_is_absent_without_a_value(self):
        for value in (None, 0, 0.0):
            model = _small(init_values=value)
            assert not any("gamma" in name for name in model.state_dict())

    @pytest.mark.parametrize("depth_first", [False, True])
    def test_named_apply_order(self, depth_first):
        module = nn.Sequential(nn.Sequential(nn.ReLU()))
        seen = []
        result = named_apply(
            lambda module, name: seen.append(name),
            module,
            name="m",
            depth_first=depth_first,
            include_root=True,
        )
        names = ["m", "m.0", "m.0.0"]
        assert result is module and seen == (names[::-1] if depth_first else names)


class TestFeedForward:
    @pytest.mark.parametrize("name", ["swiglu", "swiglufused"])
    def test_swiglu(self, name):
        assert isinstance(_small(ffn_layer=name).blocks[0].mlp, SwiGLUFFNFused)

    def test_identity(self):
        model = _small(ffn_layer="identity")
        assert isinstance(model.blocks[0].mlp, nn.Identity)
        assert model(*_images((1, 28, 28))).shape == (1, 48)

    def test_unknown(self):
        with pytest.raises(NotImplementedError, match='"swigluu" does not exist .did you mean "swiglu"'):
            _small(ffn_layer="swigluu")


@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_bfloat16_autocast(rate):
    model = _small(num_register_tokens=2, drop_path_rate=rate, drop_path_uniform=True)
    images = _images((4, 56, 56), (8, 28, 28))
    masks = [torch.rand(4, 16) < 0.5, None]
    if rate == 0.0:
        want = model.forward_features(images, masks)[0]["x_norm_patchtokens"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model.forward_features(images, masks)
    loss = sum(out["x_norm_patchtokens"].float().square().mean() for out in outputs)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    if rate == 0.0:
        got = outputs[0]["x_norm_patchtokens"].float()
        assert (got - want).norm() < 0.02 * want.norm()
