"""Files of Zenodo records, from a server on this machine that speaks the two addresses needed."""

import hashlib
import json

import pytest

from dinov2.errors import WeightsError
from dinov2.models import transfer
from dinov2.models.downloads import DownloadError
from dinov2.models.sources import locate
from dinov2.models.zenodo import FARM_NAME, farm_file, fetch_from_zenodo
from tests.models.servers import Served, Server, running

FARM = "dinov2_vits_NCT_10k_training_1999_teacher_checkpoint.pth"
CONTENT = b"weights of the farm" * 1000
MD5 = hashlib.md5(CONTENT, usedforsecurity=False).hexdigest()


class Zenodo(Server):
    """One record, 42; the address of a file is asked with its query."""

    def paths(self):
        return [path for path, _ in self.requests]


@pytest.fixture
def zenodo(tmp_path, monkeypatch):
    monkeypatch.setenv("DINOV2_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(transfer, "PAUSE_SECONDS", 0.0)
    with running(Zenodo()) as server:
        monkeypatch.setenv("DINOV2_ZENODO_URL", f"{server.url}/")
        server.files[f"/records/42/files/{FARM}?download=1"] = Served(CONTENT)
        server.files["/api/records/42"] = record([FARM, f"md5:{MD5}"], ["notes.txt", "md5:0"])
        yield server


def record(*files) -> Served:
    return Served(
        json.dumps({"id": 42, "files": [{"key": key, "checksum": sum_} for key, sum_ in files]}).encode()
    )


def test_a_file_is_fetched_once_and_compared_with_the_record(zenodo, tmp_path):
    path = fetch_from_zenodo(f"42/{FARM}")
    assert path == tmp_path / "cache" / "zenodo" / "42" / FARM and path.read_bytes() == CONTENT
    assert zenodo.paths() == ["/api/records/42", f"/records/42/files/{FARM}?download=1"]
    assert fetch_from_zenodo(f"42/{FARM}") == path
    assert len(zenodo.requests) == 2


def test_a_download_with_another_checksum_is_refused(zenodo, tmp_path):
    zenodo.files[f"/records/42/files/{FARM}?download=1"].content = CONTENT[:-1] + b"x"
    with pytest.raises(WeightsError) as caught:
        fetch_from_zenodo(f"42/{FARM}")
    assert f"expected {MD5}" in str(caught.value) and "md5" in str(caught.value)
    assert not (tmp_path / "cache" / "zenodo" / "42" / FARM).exists()


@pytest.mark.parametrize(
    "api",
    [
        None,
        Served(b"", status=[500] * 9),
        Served(b"<html>"),
        Served(b"{}"),
        Served(b'{"files": [3]}'),
        Served(b"[]"),
    ],
)
def test_without_the_record_the_file_is_fetched_unchecked(zenodo, api, monkeypatch, caplog):
    caplog.set_level("INFO", logger="dinov2")
    if api is None:
        api = Served(b"", status=[403])
    zenodo.files["/api/records/42"] = api
    assert fetch_from_zenodo(f"42/{FARM}").read_bytes() == CONTENT
    assert "no checksum" in caplog.text


def test_a_record_that_states_no_md5_is_noted(zenodo, caplog):
    caplog.set_level("INFO", logger="dinov2")
    zenodo.files["/api/records/42"] = record([FARM, "crc:1"])
    assert fetch_from_zenodo(f"42/{FARM}").read_bytes() == CONTENT
    assert "it states 'crc:1'" in caplog.text


def test_what_the_record_lacks_gets_the_nearest_name(zenodo):
    with pytest.raises(WeightsError, match=f'has no file "{FARM[:-1]}"') as caught:
        fetch_from_zenodo(f"42/{FARM[:-1]}")
    assert f'did you mean "{FARM}"?' in str(caught.value)
    with pytest.raises(WeightsError, match="no record 43"):
        fetch_from_zenodo(f"43/{FARM}")


@pytest.mark.parametrize("name", ["", "42", "42/", "x/a.pth", "42/a/b.pth", "42/..", "/a.pth"])
def test_a_name_of_another_form_is_refused(name, zenodo):
    with pytest.raises(WeightsError, match="zenodo:<record>/<file>"):
        fetch_from_zenodo(name)
    assert zenodo.requests == []


def test_offline_the_message_names_the_place_for_a_copy(tmp_path, monkeypatch):
    monkeypatch.setenv("DINOV2_CACHE", str(tmp_path))
    monkeypatch.setenv("DINOV2_ZENODO_URL", "http://127.0.0.1:1")
    with pytest.raises(DownloadError) as caught:
        fetch_from_zenodo(f"42/{FARM}")
    assert str(tmp_path / "zenodo" / "42" / FARM) in str(caught.value)


def test_names_of_the_model_farm_are_recognised():
    prefix = FARM.removesuffix("teacher_checkpoint.pth")
    for kind in ("teacher", "student", "teacher_dino_head", "student_dino_head", "teacher_ibot_head"):
        assert FARM_NAME.fullmatch(f"{prefix}{kind}_checkpoint.pth")
    for name in ("teacher_checkpoint.pth", "dinov2_vits14_pretrain.pth", f"folder/{FARM}"):
        assert farm_file(name) is None


def test_a_bare_name_of_the_farm_is_looked_up(zenodo, tmp_path, monkeypatch):
    with pytest.raises(WeightsError, match=f"zenodo:<record>/{FARM}") as caught:
        locate(FARM)
    assert "neither here nor below" in str(caught.value)
    fetched = fetch_from_zenodo(f"42/{FARM}")
    assert locate(FARM) == fetched
    second = tmp_path / "cache" / "zenodo.org" / "records" / "43" / FARM
    second.parent.mkdir(parents=True)
    second.write_bytes(b"")
    with pytest.raises(WeightsError, match="several times"):
        locate(FARM)
    monkeypatch.chdir(tmp_path)
    (tmp_path / FARM).write_bytes(b"here")
    assert locate(FARM).read_bytes() == b"here"
