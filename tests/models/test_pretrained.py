"""The loader on tiny models: which part of a file, refusals with their sentences, position embeddings."""

import logging
import pickle

import pytest
import torch

from dinov2.errors import WeightsError
from dinov2.layers import DINOHead
from dinov2.models.pretrained import (
    build_from_weights,
    load_backbone,
    load_pretrained_weights,
    read_state_dict,
)
from dinov2.models.vision_transformer import DinoVisionTransformer
from tests.conftest import load_golden_json, load_golden_tensors
from tests.models.vits import block_fn, holds, named, refusal, tiny, written

# --- what a file may be -------------------------------------------------------------------------------


class Attack:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path):
    model, proof = tiny(), tmp_path / "proof"
    for legacy in (False, True):
        path = tmp_path / f"evil{legacy}.pth"
        content = {"teacher": model.state_dict(), "extra": Attack(proof)}
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
        assert "could run code" in refusal(model, str(path))
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Attack(proof)))
    refusal(model, str(tmp_path / "raw.pth"))
    assert not proof.exists()


def test_archives_without_checksums_are_taken(tmp_path):
    model, source = tiny(seed=1), tiny()
    torch.serialization.set_crc32_options(False)
    try:
        path = written(tmp_path / "a.pth", source.state_dict())
    finally:
        torch.serialization.set_crc32_options(True)
    load_backbone(model, path)
    assert holds(model, source.state_dict())


@pytest.mark.parametrize("content", [torch.zeros(3), [1, 2], {}, {"epoch": 3}, {"optimizer": {"lr": 1.0}}])
def test_a_file_without_weights_is_refused(content, tmp_path):
    refusal(tiny(), written(tmp_path / "a.pth", content))


def test_sources_that_do_not_exist_are_named(tmp_path):
    model = tiny()
    assert str(tmp_path / "no.pth") in refusal(model, str(tmp_path / "no.pth"))
    assert "no weight file at all" in refusal(model, str(tmp_path))
    assert "accepted is a path" in refusal(model, "s3://bucket/weights.pth")
    assert "accepted is a path" in refusal(model, "file:///nowhere/weights.pth")


def test_a_folder_means_the_checkpoint_of_the_entry(tmp_path):
    teacher, student = tiny(), tiny(qkv_bias=False)
    written(tmp_path / "teacher_checkpoint.pth", {"teacher": teacher.state_dict()})
    written(tmp_path / "student_checkpoint.pth", {"student": student.state_dict()})
    assert "blocks.0.attn.qkv.bias" in read_state_dict(str(tmp_path))
    assert "blocks.0.attn.qkv.bias" not in read_state_dict(str(tmp_path), entry="student")
    assert "blocks.0.attn.qkv.bias" in read_state_dict((tmp_path / "teacher_checkpoint.pth").as_uri())


# --- which part of a file -----------------------------------------------------------------------------


def test_the_entry_asked_for_is_taken_and_the_teacher_otherwise():
    teacher, student = tiny(), tiny(num_register_tokens=2)
    separate = {"student": named("backbone.", student), "teacher": named("backbone.", teacher)}
    together = {"model": {**named("student.backbone.", student), **named("teacher.backbone.", teacher)}}
    for content in (separate, together):
        registers, plain = tiny(seed=1, num_register_tokens=2), tiny(seed=1)
        assert "register_tokens" in load_backbone(registers, content, entry="student").loaded
        assert "register_tokens" not in load_backbone(plain, content).loaded
        assert holds(registers, student.state_dict()) and holds(plain, teacher.state_dict())
        assert "register tokens is 0 in the weights and 2 in the model" in refusal(student, content)
    assert 'no entry "student", only teacher' in refusal(
        tiny(seed=1), {"teacher": teacher.state_dict()}, entry="student"
    )
    bare = tiny(seed=1)
    load_backbone(bare, teacher.state_dict(), entry="student")  # nothing to choose from
    assert holds(bare, teacher.state_dict())


def test_a_tensor_beside_the_entries_hides_none_of_them():
    source = tiny()
    for content in ({"teacher": named("backbone.", source), "step": torch.tensor(3)},
                    {"model": source.state_dict(), "rng": torch.zeros(4)}):  # fmt: skip
        model = tiny(seed=1)
        report = load_backbone(model, content)
        assert holds(model, source.state_dict())
        assert report.share == 1.0 and list(report.unused.values()) == ["tensor of another entry"]


def test_what_has_no_values_anywhere_is_refused():
    state = {name: tensor for name, tensor in tiny().state_dict().items() if name != "norm.weight"}
    sizes = {"img_size": 28, "patch_size": 7, "embed_dim": 24, "depth": 4, "num_heads": 2}
    with torch.device("meta"):
        empty = DinoVisionTransformer(**sizes, init_values=0.1, block_chunks=0)
    with pytest.raises(WeightsError, match=r"lack norm\.weight, and the model on the meta device"):
        load_backbone(empty, state, allow_missing=("norm.weight",))


def test_arguments_that_name_nothing_are_refused():
    model = tiny()
    assert 'no entry "foo" in the given dictionary: use teacher or student' in refusal(
        model, model.state_dict(), entry="foo"
    )
    with pytest.raises(WeightsError, match="img_size 30 does not divide into the patches of 7 px"):
        build_from_weights(model.state_dict(), img_size=30, num_heads=2)
    with pytest.raises(WeightsError, match="width 24, which 5 attention heads cannot share"):
        build_from_weights(model.state_dict(), num_heads=5)


def test_prefixes_come_off_the_start_of_a_name_only():
    model, source = tiny(seed=1), tiny()
    load_backbone(model, named("module.backbone.", source))
    assert holds(model, source.state_dict())
    odd = {**model.state_dict(), "blocks.0.backbone.norm1.weight": torch.zeros(24)}
    assert "blocks.0.backbone.norm1.weight" in refusal(model, odd)
    assert "twice" in refusal(model, {**model.state_dict(), "module.cls_token": torch.zeros(1, 1, 24)})


def test_head_files_and_shards_are_told_apart_from_backbones():
    assert "teacher_dino_head" in refusal(tiny(), {"teacher_dino_head": DINOHead(24, 8).state_dict()})
    assert "shard" in refusal(tiny(), {"model": {"student.backbone._flat_param": torch.zeros(9)}})


def test_the_report_accounts_for_every_tensor(caplog):
    model, source = tiny(seed=1, block_chunks=2), tiny(img_size=56)
    content = {"teacher": {**named("backbone.", source), "dino_head.mlp.0.weight": torch.zeros(2)}}
    del content["teacher"]["backbone.mask_token"]
    with caplog.at_level(logging.INFO, logger="dinov2"):
        report = load_backbone(model, content)
    assert sorted(report.loaded + list(report.missing)) == sorted(model.state_dict())
    assert torch.equal(model.norm.weight, source.norm.weight)
    assert report.missing == {"mask_token": "keeps its random initial values"}  # the fixture drew it
    assert report.unused == {"teacher.dino_head.mlp.0.weight": "projection head"}
    used = [name for names in report.used.values() for name in names]
    assert sorted(used) == sorted(report.loaded)
    assert {f"teacher.{name}" for name in content["teacher"]} == {
        *report.used,
        "teacher.dino_head.mlp.0.weight",
    }
    numbers = {name: tensor.numel() for name, tensor in model.state_dict().items()}
    assert report.share == 1 - numbers["mask_token"] / sum(numbers.values())
    assert "8x8 -> 4x4" in report.resampled["pos_embed"] and "offset 0.1" in report.resampled["pos_embed"]
    assert report.summary() in caplog.text
    assert "mask_token" in report.summary()


def test_the_historic_call_still_works(tmp_path):
    model, source = tiny(seed=1), tiny()
    path = written(tmp_path / "a.pth", {"teacher": named("backbone.", source)})
    load_pretrained_weights(model, path, "teacher")
    assert holds(model, source.state_dict())


# --- what does not fit --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"embed_dim": 32}, "width is 32 in the weights and 24 in the model (student.arch)"),
        ({"depth": 5}, "depth is 5 in the weights and 4 in the model (student.arch)"),
        ({"patch_size": 14}, "patch size is 14 in the weights and 7 in the model (student.patch_size)"),
        ({"num_register_tokens": 3}, "register tokens is 3 in the weights and 0 in the model"),
        ({"ffn_layer": "swiglufused"}, "feed forward is swiglufused in the weights and mlp in the model"),
        ({"init_values": None}, "layer scale is False in the weights and True in the model"),
        ({"qkv_bias": False}, "qkv bias is False in the weights and True in the model (student.qkv_bias)"),
        ({"proj_bias": False}, "proj bias is False in the weights and True in the model"),
        ({"ffn_bias": False}, "ffn bias is False in the weights and True in the model"),
        ({"mlp_ratio": 2}, "feed forward width is 48 in the weights and 96 in the model (student.mlp_ratio)"),
        ({"in_chans": 1}, "patch_embed.proj.weight (24, 1, 7, 7) instead of (24, 3, 7, 7)"),
    ],
)
def test_a_contradiction_names_both_values_and_the_config_key(options, words):
    assert words in refusal(tiny(), tiny(**options).state_dict())


def test_all_contradictions_are_said_at_once():
    message = refusal(tiny(), tiny(embed_dim=32, qkv_bias=False, patch_size=14).state_dict())
    assert all(words in message for words in ("width is 32", "qkv bias is False", "patch size is 14"))


def test_missing_and_unknown_tensors_are_refused():
    model = tiny()
    state = dict(model.state_dict())
    del state["norm.bias"], state["blocks.2.norm1.weight"]
    state["surplus"] = torch.zeros(1)
    message = refusal(model, state)
    assert "2 missing: blocks.2.norm1.weight, norm.bias" in message
    assert "1 not known to the model: surplus" in message
    state = dict(model.state_dict())
    del state["mask_token"]
    assert "mask_token" in refusal(model, state, allow_missing=())


def test_weights_of_something_else_are_refused():
    assert "No tensor" in refusal(tiny(), {"layer1.0.conv1.weight": torch.zeros(3)})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_are_refused(value):
    model = tiny()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["blocks.1.mlp.fc1.weight"][0, 0] = value
    assert "NaN or infinity in 1 tensors (blocks.1.mlp.fc1.weight)" in refusal(model, state)


def test_integer_weights_are_refused():
    model = tiny()
    assert "not floating point: cls_token" in refusal(
        model, {**model.state_dict(), "cls_token": torch.ones(1, 1, 24).long()}
    )


# --- position embeddings ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case", ["p14", "p14_reg4", "p14_antialias_off01", "p14_noantialias_off0", "p14_antialias_off0"]
)
def test_positions_resampled_at_load_give_the_recorded_outputs(case):
    """The reference resampled them when it ran; a model built for the other size must not differ."""
    cases, inputs = load_golden_json("vit_cases.json")["cases"], load_golden_tensors("vit_inputs.safetensors")
    recorded = load_golden_tensors(cases[case]["file"])
    weights = load_golden_tensors(cases[cases[case]["weights_from"] or case]["file"])
    state = {name.removeprefix("state."): t for name, t in weights.items() if name.startswith("state.")}
    checked = 0
    for run in cases[case]["runs"]:
        image = inputs[run["x"]] if isinstance(run.get("x"), str) else None
        if run["kind"] != "features" or run["mask"] or image.shape[-1] == cases[case]["ctor"]["img_size"]:
            continue
        ctor = {**cases[case]["ctor"], "img_size": tuple(image.shape[-2:])}
        model = DinoVisionTransformer(block_fn=block_fn, **ctor).eval()
        report = load_backbone(model, state, allow_missing=())
        assert "pos_embed" in report.resampled
        # The rows of a resampled, non-square grid are used as they are: the stored grid is the image's.
        with torch.inference_mode():
            model.interpolate_pos_encoding = lambda *_, model=model: model.pos_embed
            out = model.forward_features(image)
        for entry in ("x_norm_clstoken", "x_norm_patchtokens"):
            torch.testing.assert_close(out[entry], recorded[f"out.{run['id']}.{entry}"], rtol=1e-4, atol=1e-5)
        checked += 1
    assert checked


def test_positions_that_are_no_square_grid_are_refused():
    model = tiny()
    state = {**model.state_dict(), "pos_embed": torch.zeros(1, 12, 24)}
    assert "not a square grid" in refusal(model, state)


def test_weights_that_were_never_filled_are_refused():
    state = {name: torch.zeros_like(tensor) for name, tensor in tiny().state_dict().items()}
    assert "All weight matrices in the given dictionary are zero" in refusal(tiny(), state)
