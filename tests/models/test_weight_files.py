"""Opening weight files: formats, lazy reading, and one sentence for everything that is no weight file."""

import argparse
import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import save_file

from dinov2.errors import WeightsError
from dinov2.models.integrity import sha256_of
from dinov2.models.stored import StoredTensor
from dinov2.models.torch_files import STAND_INS
from dinov2.models.weight_files import open_file, read_file


def weights():
    generator = torch.Generator().manual_seed(0)
    return {
        "cls_token": torch.randn(1, 1, 8, generator=generator),
        "blocks.0.norm1.weight": torch.randn(8, generator=generator).bfloat16(),
        "blocks.1.norm1.weight": torch.randn(8, generator=generator).half(),
        "steps": torch.tensor([3]),
    }


def refusal(path) -> str:
    """The one sentence with which a file is refused."""
    with pytest.raises(WeightsError) as caught:
        open_file(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


def write_sharded(folder: Path, *, suffix=".safetensors") -> Path:
    """The weights in two files with an index, as transformers lays them out."""
    state, stem = weights(), "model" if suffix == ".safetensors" else "pytorch_model"
    table = {}
    for number, names in enumerate([list(state)[:2], list(state)[2:]], 1):
        file = f"{stem}-{number:05d}-of-00002{suffix}"
        part = {name: state[name] for name in names}
        save_file(part, folder / file) if suffix == ".safetensors" else torch.save(part, folder / file)
        table |= dict.fromkeys(names, file)
    index = folder / f"{stem}{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 100}, "weight_map": table}))
    return index


def write(folder: Path, kind: str) -> Path:
    if kind.startswith("sharded"):
        return write_sharded(folder, suffix=".bin" if "torch" in kind else ".safetensors")
    path = folder / ("a.safetensors" if kind == "safetensors" else "a.pth")
    if kind == "safetensors":
        save_file(weights(), path, {"format": "pt"})
    else:
        torch.save(weights(), path, _use_new_zipfile_serialization=kind == "torch zip")
    return path


KINDS = ["safetensors", "sharded safetensors", "torch zip", "torch legacy", "sharded torch"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_is_listed_and_read(kind, tmp_path):
    opened = open_file(write(tmp_path, kind))
    assert opened.kind == kind
    assert opened.content.keys() == weights().keys()
    for name, expected in weights().items():
        stored = opened.content[name]
        assert (stored.shape, stored.dtype, stored.names) == (tuple(expected.shape), expected.dtype, (name,))
        assert torch.equal(stored.read(), expected)
    for name, tensor in read_file(opened.path).items():
        assert torch.equal(tensor, weights()[name])


def test_the_words_beside_the_tensors_are_kept(tmp_path):
    assert open_file(write(tmp_path, "safetensors")).metadata == {"format": "pt"}
    assert open_file(write_sharded(tmp_path)).metadata == {"total_size": "100"}


def test_nested_entries_keep_their_place_and_tensors_their_path(tmp_path):
    saved = {"teacher": {"backbone": weights()}, "optimizer": {"state": {0: [torch.ones(2)]}}, "epoch": 3}
    torch.save(saved, tmp_path / "a.pth")
    content = open_file(tmp_path / "a.pth").content
    assert content["epoch"] == 3
    assert content["teacher"]["backbone"]["steps"].names == ("teacher.backbone.steps",)
    (moment,) = content["optimizer"]["state"][0]
    assert isinstance(moment, StoredTensor) and moment.names == ("optimizer.state.0.0",)
    assert torch.equal(read_file(tmp_path / "a.pth")["optimizer"]["state"][0][0], torch.ones(2))


def test_a_tensor_read_from_safetensors_outlives_the_file(tmp_path):
    path = write(tmp_path, "safetensors")
    tensor = open_file(path).content["cls_token"].read()
    path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(tensor, weights()["cls_token"])


MEASURE = """
import json, re, sys
from pathlib import Path
import torch
from dinov2.models.torch_files import STAND_INS
from dinov2.models.weight_files import open_file

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

content = open_file(Path(sys.argv[1])).content
before = peak()
model = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in content.items()}
for name, tensor in content.items():
    model[name].copy_(tensor.read())
print(json.dumps([peak() - before, sum(tensor.nbytes for tensor in content.values())]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_loading_a_sharded_file_needs_little_more_memory_than_its_model(tmp_path):
    table = {}
    for shard in range(3):
        file = f"model-{shard}.safetensors"
        part = {f"{shard}.{number}": torch.ones(1 << 21) for number in range(10)}  # 84 MB
        save_file(part, tmp_path / file)
        table |= dict.fromkeys(part, file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": table}))
    result = subprocess.run([sys.executable, "-c", MEASURE, str(index)], capture_output=True, check=True)
    growth, size = json.loads(result.stdout)
    assert size == 30 << 23
    assert size * 0.9 < growth < size * 1.3


def test_a_safetensors_file_that_begins_like_a_pickle_is_told_apart(tmp_path):
    path = tmp_path / "a.safetensors"
    for padding in range(0, 256, 8):
        save_file(weights(), path, {"padding": "x" * padding})
        if path.read_bytes()[0] == 0x80:
            break
    assert path.read_bytes()[:1] == b"\x80"
    assert open_file(path).content.keys() == weights().keys()


# --- pickles ------------------------------------------------------------------------------------------


def pickled(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


@pytest.mark.parametrize("legacy", [False, True])
def test_options_and_numpy_numbers_of_dino_and_ibot_are_read(legacy, tmp_path):
    numbers = [
        numpy.float64(0.1),
        numpy.float32(-2.5),
        numpy.float16(1.5),
        numpy.int64(-(2**40)),
        numpy.int32(7),
        numpy.uint8(255),
        numpy.bool_(True),
        numpy.dtype(">i4").type(5),
    ]
    saved = {
        "student": weights(),
        "args": argparse.Namespace(arch="vit_small", patch_size=16, betas=[0.9, numpy.float64(0.99)]),
        "numbers": numbers,
    }
    torch.save(saved, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    content = read_file(tmp_path / "a.pth")
    assert content["args"] == argparse.Namespace(arch="vit_small", patch_size=16, betas=[0.9, 0.99])
    assert content["numbers"] == numbers
    assert {type(number) for number in content["numbers"]} == {float, int, bool}
    assert torch.equal(content["student"]["cls_token"], weights()["cls_token"])
    assert not set(STAND_INS) & set(torch.serialization.get_safe_globals())


def test_numpy_numbers_of_older_releases_are_read(tmp_path):
    path = pickled(tmp_path / "a.pth", {"best": numpy.float64(0.25)})
    with zipfile.ZipFile(path) as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert b"numpy.core" in path.read_bytes()
    assert read_file(path) == {"best": 0.25}


class Attack:
    """Calls what it was given when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"a": Path("x")}, "pathlib"),
        ({"a": numpy.zeros(3)}, "numpy._core.multiarray._reconstruct"),
        ({"a": numpy.str_("x")}, "numpy.dtype"),
        ({"a": argparse.ArgumentParser}, "argparse.ArgumentParser"),
        ({"a": Attack(numpy.dtype, "O")}, "numpy.dtype('O')"),
        ({"a": Attack(numpy.dtype, [("f", "O")])}, "numpy.dtype("),
        ({"a": Attack(numpy.load, "x.npy")}, "numpy.load"),
        ({"a": Attack(eval, "1")}, "eval"),
        ({"a": Attack(os.system, "true")}, "system"),
        ({"a": Attack(getattr, argparse.Namespace(), "x")}, "getattr"),
    ],
)
def test_other_classes_are_still_refused_by_name(content, named, tmp_path):
    message = refusal(pickled(tmp_path / "a.pth", content))
    assert "could run code" in message and named in message


def test_code_behind_an_options_object_does_not_run(tmp_path):
    proof = tmp_path / "proof"
    for content in (
        argparse.Namespace(run=Attack(open, str(proof), "w")),
        [numpy.float64(1), Attack(open, str(proof), "w")],
        Attack(argparse.Namespace, Attack(open, str(proof), "w")),
    ):
        assert "could run code" in refusal(pickled(tmp_path / "a.pth", {"args": content}))
    assert not proof.exists()


def test_a_number_without_its_type_or_value_is_damage(tmp_path):
    scalar = numpy.float64(1).__reduce__()[0]
    for arguments in ((numpy.dtype("f8"), b"123"), ("f8", b"12345678"), (numpy.dtype("f8"),)):
        assert "damaged" in refusal(pickled(tmp_path / "a.pth", {"a": Attack(scalar, *arguments)}))


def test_lists_of_lists_without_end_are_refused(tmp_path):
    bomb = []
    for _ in range(30):
        bomb = [bomb] * 10
    assert "nested without end" in refusal(pickled(tmp_path / "bomb.pth", {"a": bomb}))
    circle = []
    circle.append(circle)
    assert "nested without end" in refusal(pickled(tmp_path / "circle.pth", {"a": circle}))


def test_one_long_list_named_many_times_is_refused(tmp_path):
    numbers = list(range(2000))
    assert "nested without end" in refusal(pickled(tmp_path / "bomb.pth", {"a": [numbers] * 2000}))


def test_tensors_without_values_of_their_own_are_refused(tmp_path):
    huge = torch.zeros(1).expand(10**6, 10**6)
    assert "larger than the file" in refusal(pickled(tmp_path / "a.pth", {"a": huge}))
    assert "no plain values" in refusal(pickled(tmp_path / "b.pth", {"a": torch.zeros(3, device="meta")}))
    assert "no plain values" in refusal(pickled(tmp_path / "c.pth", {"a": torch.eye(3).to_sparse()}))
    nested = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])
    assert "no plain values" in refusal(pickled(tmp_path / "d.pth", {"a": nested}))


# --- files that are not what they seem ----------------------------------------------------------------


def test_a_legacy_file_that_declares_a_huge_storage_is_refused(tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"a": torch.zeros(77777)}, path, _use_new_zipfile_serialization=False)
    raw = path.read_bytes()
    small = b"J" + (77777).to_bytes(4, "little")
    assert small in raw
    for elements in (10**9, 10**15):
        digits = elements.to_bytes(8, "little")
        path.write_bytes(raw.replace(small, b"\x8a" + bytes([len(digits)]) + digits))
        assert "damaged" in refusal(path)


def test_archives_whose_sizes_lie_are_refused(tmp_path):
    path = pickled(tmp_path / "a.pth", weights())
    raw = path.read_bytes()
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        table, records = archive.start_dir, len(archive.infolist())
    entry = table
    for _ in range(records):
        name, extra, comment = (
            int.from_bytes(raw[entry + at : entry + at + 2], "little") for at in (28, 30, 32)
        )
        size = int.from_bytes(raw[entry + 24 : entry + 28], "little")
        for lie in (size + 1, size + 100_000, 2**31):
            changed = bytearray(raw)
            changed[entry + 20 : entry + 28] = lie.to_bytes(4, "little") * 2
            path.write_bytes(changed)
            message = refusal(path)
            assert "damaged" in message or "claim more bytes" in message
        entry += 46 + name + extra + comment


@pytest.mark.parametrize("length", [10**15, 2**63, 10**6, 1])
def test_a_safetensors_header_that_lies_about_its_length_is_refused(length, tmp_path):
    path = write(tmp_path, "safetensors")
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    assert "damaged" in refusal(path)


def test_a_safetensors_header_that_lies_about_a_shape_is_refused(tmp_path):
    path = write(tmp_path, "safetensors")
    path.write_bytes(path.read_bytes().replace(b'"shape":[1,1,8]', b'"shape":[1,9,8]'))
    assert "damaged" in refusal(path)


def test_a_type_that_is_not_read_is_named(tmp_path):
    header = json.dumps({"a": {"dtype": "F8_E8M0", "shape": [4], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    assert "a, F8_E8M0" in refusal(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("record", "words"),
    [("a/constants.pkl", "TorchScript"), ("teacher_checkpoint.pth", "unpack it")],
)
def test_other_archives_are_called_by_their_name(record, words, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr(record, b"x")
    assert words in refusal(tmp_path / "a.pt")


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html>Sign in</html>", "web page"),
        (b"\n <html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (b"\x1f\x8b\x08\0" + b"x" * 50, "gzip"),
        (b"\x89HDF\r\n\x1a\n" + b"x" * 50, "HDF5"),
        (b"weights are on the server", "neither a PyTorch nor a safetensors file"),
    ],
)
def test_what_is_no_weight_file_is_called_by_its_name(content, words, name, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert words in refusal(tmp_path / name)


def test_a_raw_pickle_does_not_run(tmp_path):
    proof = tmp_path / "proof"
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / "a.pth").write_bytes(pickle.dumps(Attack(open, str(proof), "w"), protocol))
        refusal(tmp_path / "a.pth")
    assert not proof.exists()


def test_what_is_no_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe.pth")
    (tmp_path / "loop.pth").symlink_to(tmp_path / "loop.pth")
    (tmp_path / "folder.pth").mkdir()
    assert "device or pipe" in refusal(tmp_path / "pipe.pth")
    assert "device or pipe" in refusal(Path("/dev/zero"))
    assert "symbolic links" in refusal(tmp_path / "loop.pth")
    assert "is a folder" in refusal(tmp_path / "folder.pth")
    assert "No such file" in refusal(tmp_path / "none.pth")
    assert "cannot be read" in refusal(tmp_path / ("x" * 300))


def test_a_file_without_permission_is_named(tmp_path):
    path, user = write(tmp_path, "safetensors"), os.geteuid()
    path.chmod(0)
    if user == 0:  # the administrator may read everything
        os.seteuid(65534)
    try:
        assert "Permission denied" in refusal(path)
    finally:
        os.seteuid(user)


# --- checkpoints in several files ---------------------------------------------------------------------


def edited(index: Path, change) -> Path:
    content = json.loads(index.read_text())
    change(content)
    index.write_text(json.dumps(content))
    return index


def test_all_missing_shards_are_named_at_once(tmp_path):
    index = write_sharded(tmp_path)
    shards = sorted(tmp_path.glob("model-*"))
    for shard in shards:
        shard.unlink()
    message = refusal(index)
    assert all(shard.name in message for shard in shards) and "2 of the 2 files" in message


def test_a_shard_of_an_impossible_name_is_missing(tmp_path):
    index = write_sharded(tmp_path)
    edited(index, lambda content: content["weight_map"].update(steps="x" * 300))
    assert "are missing" in refusal(index)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/../../b", "..\\b", "", "c:\\x"])
def test_an_index_reaches_no_other_folder(name, tmp_path):
    (tmp_path / "inside").mkdir()
    save_file(weights(), tmp_path / "secret.safetensors")
    index = edited(
        write_sharded(tmp_path / "inside"), lambda content: content["weight_map"].update(steps=name)
    )
    assert "not in its own folder" in refusal(index)


def test_an_index_does_not_lead_to_an_index(tmp_path):
    index = write_sharded(tmp_path)
    assert "another index" in refusal(
        edited(index, lambda content: content["weight_map"].update(a=index.name))
    )


def test_tensors_must_be_where_the_index_says(tmp_path):
    index = write_sharded(tmp_path)
    edited(index, lambda content: content["weight_map"].update(lost="model-00001-of-00002.safetensors"))
    assert "1 tensors" in refusal(index) and "(lost)" in refusal(index)


def test_tensors_that_the_index_forgets_are_shown(tmp_path):
    index = edited(write_sharded(tmp_path), lambda content: content["weight_map"].pop("cls_token"))
    assert open_file(index).content.keys() == weights().keys()


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "[" * 10_000]
)
def test_what_is_no_index_is_refused(text, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    refusal(tmp_path / "model.safetensors.index.json")


def test_shards_of_torch_are_read_as_safely_as_single_files(tmp_path):
    index = write_sharded(tmp_path, suffix=".bin")
    proof = tmp_path / "proof"
    torch.save({"steps": Attack(open, str(proof), "w")}, tmp_path / "pytorch_model-00002-of-00002.bin")
    with pytest.raises(WeightsError, match="could run code"):
        open_file(index)
    assert not proof.exists()


# --- checksums ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_compared_with_the_checksum_beside_it(kind, tmp_path):
    path = write(tmp_path, kind)
    for file in [*tmp_path.iterdir()]:
        (tmp_path / f"{file.name}.sha256").write_text(f"{sha256_of(file)} *./{file.name}\n")
    open_file(path)
    last = sorted(file for file in tmp_path.iterdir() if file.suffix in (".pth", ".bin", ".safetensors"))[-1]
    raw = bytearray(last.read_bytes())
    raw[-5] ^= 1
    before = sha256_of(last)
    last.write_bytes(raw)
    with pytest.raises(WeightsError) as caught:
        open_file(path)
    assert before in str(caught.value) and sha256_of(last) in str(caught.value)


def test_a_list_of_checksums_must_name_the_file(tmp_path):
    path, sidecar = write(tmp_path, "torch zip"), tmp_path / "a.pth.sha256"
    sidecar.write_text(f"{sha256_of(path)}\n")
    open_file(path)
    sidecar.write_text(f"{sha256_of(path)}  a.pth\n{'0' * 64}  b.pth\n")
    open_file(path)
    for text in (f"{sha256_of(path)}  b.pth\n", "", f"{sha256_of(path)[:-1]}  a.pth\n"):
        sidecar.write_text(text)
        assert "has 0 checksums" in refusal(path)
