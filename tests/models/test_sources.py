"""What a user may name, and which file is meant."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from dinov2.errors import WeightsError
from dinov2.models import sources
from dinov2.models.downloads import cache_dir
from dinov2.models.integrity import sha256_of
from dinov2.models.releases import RELEASE_URLS
from dinov2.models.sources import ACCEPTED_SOURCES, locate
from dinov2.models.weight_files import read_file
from tests.models.servers import Served, Server, running

FARM = "dinov2_vits_NCT_10k_training_1999_"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DINOV2_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))


@pytest.fixture
def server():
    with running(Server()) as running_server:
        yield running_server


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "a folder" / "weights.safetensors"
    path.parent.mkdir()
    save_file({"cls_token": torch.ones(3)}, path)
    return path


def refusal(source, **options) -> str:
    with pytest.raises(WeightsError) as caught:
        locate(str(source), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- paths, folders, addresses ------------------------------------------------------------------------


def test_paths_folders_and_file_addresses(weights, monkeypatch):
    assert locate(str(weights)) == locate(weights) == weights
    assert locate(str(weights.parent)) == weights
    assert locate(weights.as_uri()) == locate(weights.parent.as_uri()) == weights
    assert "%20" in weights.as_uri()
    monkeypatch.setenv("HOME", str(weights.parent))
    assert locate("~/weights.safetensors") == weights
    monkeypatch.chdir(weights.parent)
    assert locate("weights.safetensors").resolve() == weights


def test_a_path_may_contain_what_looks_like_a_name(weights, monkeypatch):
    monkeypatch.chdir(weights.parent)
    for name in ("run:1.pth", "a#b.pth", "a@b.pth", "50%.pth"):
        weights.with_name(name).write_bytes(b"")
        assert locate(name).name == locate(str(weights.with_name(name))).name == name


def test_the_model_farms_prefix_needs_no_renaming(tmp_path):
    for kind in ("teacher", "student", "teacher_dino_head", "student_dino_head"):
        (tmp_path / f"{FARM}{kind}_checkpoint.pth").write_bytes(b"x")
    assert locate(str(tmp_path)).name == f"{FARM}teacher_checkpoint.pth"
    assert locate(str(tmp_path), entry="student").name == f"{FARM}student_checkpoint.pth"
    (tmp_path / "other_teacher_checkpoint.pth").write_bytes(b"x")
    assert f"{FARM}student_checkpoint.pth" in refusal(tmp_path)


def test_a_folder_in_several_files_means_its_index(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "model-1.safetensors")
    save_file({"b": torch.zeros(2)}, tmp_path / "model-2.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}))
    assert locate(str(tmp_path)) == index
    assert read_file(index).keys() == {"a", "b"}
    assert "several files" in refusal(f"{tmp_path}#sha256={sha256_of(index)}")


def test_a_distributed_checkpoint_is_told_how_to_become_a_file(tmp_path):
    checkpoint = pytest.importorskip("torch.distributed.checkpoint")
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    checkpoint.save({"teacher": {"cls_token": torch.ones(3)}}, checkpoint_id=str(tmp_path / "dcp"))
    message = refusal(tmp_path / "dcp")
    assert f"format_utils dcp_to_torch {tmp_path / 'dcp'} weights.pth" in message
    dcp_to_torch_save(str(tmp_path / "dcp"), str(tmp_path / "weights.pth"))
    assert torch.equal(
        read_file(locate(str(tmp_path / "weights.pth")))["teacher"]["cls_token"], torch.ones(3)
    )


def test_a_web_address_is_fetched(server):
    server.files["/a/weights.pth"] = Served(b"weights")
    assert locate(f"{server.url}/a/weights.pth").read_bytes() == b"weights"
    assert locate(f"HTTP{server.url[4:]}/a/weights.pth").read_bytes() == b"weights"
    assert len(server.requests) == 1


def test_the_name_of_a_release_is_fetched(server, monkeypatch):
    monkeypatch.setitem(RELEASE_URLS, "dinov2_vitb14_reg4", f"{server.url}/b.pth")
    server.files["/b.pth"] = Served(b"ViT-B")
    assert locate("hub:dinov2_vitb14_reg").read_bytes() == b"ViT-B"
    assert 'did you mean "dinov2_vitb14"?' in refusal("hub:dinov2_vitb_14")


def test_both_spellings_of_timm_reach_the_hub(monkeypatch, weights):
    asked = []
    monkeypatch.setattr(sources, "fetch_from_hub", lambda text, entry: asked.append((text, entry)) or weights)
    for prefix in ("hf-hub:", "hf_hub:", "HF-Hub:"):
        assert locate(f"{prefix}MahmoodLab/uni@main:a/b.bin", entry="student") == weights
    assert asked == [("MahmoodLab/uni@main:a/b.bin", "student")] * 3


# --- checksums ----------------------------------------------------------------------------------------


def checked_sources(weights, server, monkeypatch):
    """Every kind of source, all of the same file."""
    content = weights.read_bytes()
    server.files |= {
        path: Served(content) for path in ("/a.pth", "/b.pth", "/records/1/files/x.pth?download=1")
    }
    monkeypatch.setitem(RELEASE_URLS, "dinov2_vitb14", f"{server.url}/b.pth")
    monkeypatch.setenv("DINOV2_ZENODO_URL", server.url)
    server.files["/api/records/1"] = Served(b'{"files": [{"key": "x.pth"}]}')
    monkeypatch.setattr(sources, "fetch_from_hub", lambda text, entry: weights)
    farm = cache_dir() / "zenodo" / "2" / f"{FARM}teacher_checkpoint.pth"
    farm.parent.mkdir(parents=True, exist_ok=True)
    farm.write_bytes(content)
    return [
        str(weights),
        str(weights.parent),
        weights.as_uri(),
        f"{server.url}/a.pth",
        "hub:dinov2_vitb14",
        "hf-hub:owner/name",
        "zenodo:1/x.pth",
        farm.name,
    ]


def test_every_source_may_carry_a_checksum(weights, server, monkeypatch):
    right, wrong = sha256_of(weights), "0" * 64
    for source in checked_sources(weights, server, monkeypatch):
        message = refusal(f"{source}#sha256={wrong}")  # not there yet
        assert wrong in message and right in message, source
        assert locate(f"{source}#sha256={right.upper()}").read_bytes() == weights.read_bytes(), source
        message = refusal(f"{source}#sha256={wrong}")  # there
        assert wrong in message and right in message, source


def test_a_checksum_that_is_none_is_refused(weights):
    for digits in ("", "123", "z" * 64, "0" * 65):
        assert "64 hexadecimal" in refusal(f"{weights}#sha256={digits}")
    assert "not understood" in refusal("https://host/a.pth#md5=0123")


def test_a_checksum_beside_the_file_is_compared_when_it_is_read(weights):
    sidecar = weights.with_name(f"{weights.name}.sha256")
    sidecar.write_text(f"{sha256_of(weights)}  {weights.name}\n")
    read_file(locate(str(weights.parent)))
    sidecar.write_text(f"{'0' * 64}  {weights.name}\n")
    with pytest.raises(WeightsError, match="0" * 64):
        read_file(locate(str(weights)))


# --- what cannot be found -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "hint"),
    [
        ("s3://bucket/weights.pth", ""),
        ("hfhub:owner/name", 'did you mean "hf-hub"?'),
        ("zenod:1/a.pth", 'did you mean "zenodo"?'),
        ("dinov2_vits14", 'did you mean "hub:dinov2_vits14"?'),
        ("MahmoodLab/uni", 'did you mean "hf-hub:MahmoodLab/uni"?'),
        ("nowhere/weights.pth", ""),
        ("file:///nowhere/weights.pth", ""),
        ("/etc/hostname/weights.pth", ""),
        ("", ""),
        (" ", ""),
    ],
)
def test_what_cannot_be_found_gets_a_hint_and_all_that_is_accepted(source, hint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refusal(source)
    assert hint in message and ("did you mean" in message) == bool(hint)
    assert ACCEPTED_SOURCES in message


def test_an_address_of_another_machine_is_refused():
    assert "another machine, server" in refusal("file://server/share/weights.pth")


def test_what_cannot_be_a_weight_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe.pth")
    (tmp_path / "loop.pth").symlink_to("loop.pth")
    (tmp_path / "lost.pth").symlink_to("gone.pth")
    assert "device or pipe" in refusal(tmp_path / "pipe.pth")
    assert "device or pipe" in refusal(f"{tmp_path / 'pipe.pth'}#sha256={'0' * 64}")
    assert "device or pipe" in refusal("/dev/zero")
    assert "cannot be read" in refusal(tmp_path / "loop.pth")
    assert "does not exist" in refusal(tmp_path / "lost.pth")
    assert "cannot be read" in refusal(tmp_path / ("x" * 300))
    assert "cannot be read" in refusal("a\0b")


def test_parts_without_their_index_are_called_that(tmp_path):
    for number in (1, 2):
        (tmp_path / f"model-0000{number}-of-00002.safetensors").write_bytes(b"x")
    assert "without the index that says what is in which" in refusal(tmp_path)


def test_a_folder_without_permission_is_named(tmp_path):
    (tmp_path / "closed").mkdir(mode=0)
    user = os.geteuid()
    if user == 0:  # the administrator may read everything
        os.seteuid(65534)
    try:
        assert "cannot be read" in refusal(tmp_path / "closed")
    finally:
        os.seteuid(user)


def test_the_documentation_names_every_accepted_source():
    from tests.conftest import REPO

    text = (REPO / "docs" / "weights.md").read_text()
    for form in (
        ".pth",
        ".index.json",
        "file:",
        "https:",
        "hub:",
        "hf-hub:",
        "zenodo:",
        "#sha256=",
        "model farm",
    ):
        assert form in text and form in ACCEPTED_SOURCES, form
