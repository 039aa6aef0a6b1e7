"""Names of DINOv2's releases: spellings, addresses, caches, checksums."""

import pytest
import torch

from dinov2.errors import WeightsError
from dinov2.hub import utils
from dinov2.models import releases
from dinov2.models.downloads import cache_path
from dinov2.models.integrity import sha256_of
from dinov2.models.releases import RELEASE_URLS, cached_release, fetch_release, release_name
from tests.models.servers import Served, Server, running


@pytest.fixture
def caches(tmp_path, monkeypatch):
    monkeypatch.setenv("DINOV2_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path


def test_the_eight_releases_have_their_addresses():
    assert len(RELEASE_URLS) == 8
    folder = "https://dl.fbaipublicfiles.com/dinov2"
    assert RELEASE_URLS["dinov2_vitg14"] == f"{folder}/dinov2_vitg14/dinov2_vitg14_pretrain.pth"
    assert RELEASE_URLS["dinov2_vitb14_reg4"] == f"{folder}/dinov2_vitb14/dinov2_vitb14_reg4_pretrain.pth"


def test_the_public_path_of_the_names_still_works():
    assert utils._DINOV2_BASE_URL == releases._DINOV2_BASE_URL
    assert utils._make_dinov2_model_name("vit_giant2", 14, 4) == "dinov2_vitg14_reg4"
    assert utils.release_url is releases.release_url


def test_registers_have_two_spellings():
    assert release_name("dinov2_vits14_reg") == release_name("dinov2_vits14_reg4") == "dinov2_vits14_reg4"
    for name in RELEASE_URLS:
        assert release_name(name) == name


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("dinov2_vits_14", "dinov2_vits14"),
        ("dinov2_vitl14_regs", "dinov2_vitl14_reg4"),
        ("vitb14", "dinov2_vitb14"),
    ],
)
def test_an_unknown_name_gets_the_nearest(name, hint):
    with pytest.raises(WeightsError, match=rf'did you mean "{hint}"\?'):
        fetch_release(name)


def test_copies_in_both_caches_are_used_and_compared(caches, monkeypatch):
    own, torchs = (
        cache_path(RELEASE_URLS["dinov2_vits14"]),
        caches / "hub/checkpoints/dinov2_vits14_pretrain.pth",
    )
    assert cached_release("dinov2_vits14") is None
    for path in (torchs, own):
        path.parent.mkdir(parents=True)
        path.write_bytes(b"another file")
        with pytest.raises(WeightsError) as caught:
            cached_release("dinov2_vits14")
        assert releases.RELEASE_SHA256["dinov2_vits14"] in str(caught.value) and sha256_of(path) in str(
            caught.value
        )
        assert fetch_release("dinov2_vits14", sha256=sha256_of(path)) == path


def test_a_release_is_downloaded_from_its_address(caches, monkeypatch):
    with running(Server()) as server:
        monkeypatch.setitem(RELEASE_URLS, "dinov2_vitb14", f"{server.url}/b.pth")
        server.files["/b.pth"] = Served(b"weights of ViT-B")
        assert fetch_release("dinov2_vitb14").read_bytes() == b"weights of ViT-B"
        monkeypatch.setitem(RELEASE_URLS, "dinov2_vits14", f"{server.url}/s.pth")
        server.files["/s.pth"] = Served(b"not ViT-S")
        with pytest.raises(WeightsError, match=releases.RELEASE_SHA256["dinov2_vits14"]):
            fetch_release("dinov2_vits14")
        assert cached_release("dinov2_vits14") is None
