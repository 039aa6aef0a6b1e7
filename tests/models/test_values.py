"""The check of values and digests, on files with all that they may say about themselves."""

import json

import pytest
import torch
from safetensors.torch import save_file

from dinov2.errors import WeightsError
from dinov2.models.digest import DIGEST_KEY, tensors_digest
from dinov2.models.pretrained import load_backbone, open_weights
from dinov2.models.values import check_values
from dinov2.models.weight_files import read_file
from tests.models.vits import refusal, tiny


def save(path, state, **metadata):
    """Write tensors with their digest, as the exporter does."""
    save_file(state, path, {DIGEST_KEY: tensors_digest(sorted(state.items())), **metadata})


def sharded(folder, *, damaged=""):
    """Write a tiny backbone in two files with a digest each; the tensor ``damaged`` changes afterwards."""
    state, table = tiny().state_dict(), {}
    for number in range(2):
        (folder / str(number)).mkdir()
        file = f"{number}/model.safetensors"
        part = {name: tensor for index, (name, tensor) in enumerate(state.items()) if index % 2 == number}
        save(folder / file, part)
        if damaged in part:
            raw, old = (folder / file).read_bytes(), part[damaged].numpy().tobytes()
            assert raw.count(old) == 1
            (folder / file).write_bytes(raw.replace(old, (part[damaged] + 1).numpy().tobytes()))
        table |= dict.fromkeys(part, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": table}))
    return str(index)


def test_every_shard_is_compared_with_its_own_digest(tmp_path):
    assert load_backbone(tiny(), sharded(tmp_path)).share == 1.0


@pytest.mark.parametrize(("damaged", "file"), [("cls_token", "0/model"), ("pos_embed", "1/model")])
def test_a_damaged_shard_is_named(damaged, file, tmp_path):
    message = refusal(tiny(), sharded(tmp_path, damaged=damaged))
    assert "have the digest" in message and f"{tmp_path / file}.safetensors" in message


def test_what_others_call_sha256_is_none_of_our_business(tmp_path):
    save(tmp_path / "a.safetensors", tiny().state_dict(), sha256="of something else")
    assert load_backbone(tiny(), str(tmp_path / "a.safetensors")).share == 1.0


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e5m2fnuz])
def test_numbers_of_eight_bits_are_checked_and_loaded(dtype, tmp_path):
    state = {name: tensor.to(dtype) for name, tensor in tiny().state_dict().items()}
    model = tiny()
    torch.save(state, tmp_path / "a.pth")
    load_backbone(model, str(tmp_path / "a.pth"))
    assert torch.equal(model.cls_token, state["cls_token"].float())
    state["cls_token"] = torch.full_like(state["cls_token"].float(), float("nan")).to(dtype)
    torch.save(state, tmp_path / "b.pth")
    assert "NaN" in refusal(tiny(), str(tmp_path / "b.pth"))


def test_packed_numbers_get_one_sentence(tmp_path):
    state = tiny().state_dict()
    packed = torch.zeros(state["cls_token"].shape, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    torch.save({**state, "cls_token": packed}, tmp_path / "a.pth")
    message = refusal(tiny(), str(tmp_path / "a.pth"))
    assert "cls_token" in message and "float4_e2m1fn_x2" in message and "float32" in message


def test_a_file_that_is_read_whole_is_checked_too(tmp_path):
    torch.save({"center": torch.tensor([1.0, float("nan")]), "step": torch.tensor(10**9)}, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match="NaN or infinity in 1 tensors"):
        read_file(tmp_path / "a.pth")
    with pytest.raises(WeightsError, match="have the digest"):
        read_file(sharded(tmp_path, damaged="cls_token"))


def test_what_was_opened_can_be_checked_without_a_model(tmp_path):
    weights = open_weights(sharded(tmp_path))
    check_values(weights.source, weights.plain, weights.tensors, weights.metadata)
