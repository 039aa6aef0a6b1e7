"""Pickle bombs are refused before they go off, and no honest file is."""

import argparse
import codecs
import io
import pickle
import zipfile
from collections import OrderedDict

import numpy
import pytest
import torch

from dinov2.errors import WeightsError
from dinov2.models.pickle_scan import MAX_DEPTH, check_pickle
from dinov2.models.weight_files import open_file, read_file
from tests.models.vits import tiny


class Call:
    """Calls a function when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def doubling(levels):
    """A tuple that holds another twice at every level: small as a pickle, endless once it is hashed."""
    value = (0,)
    for _ in range(levels):
        value = (value, value)
    return value


def key_of(value: bytes) -> bytes:
    """A pickle of a dictionary with one key; to build such a key here would set the bomb off."""
    return b"\x80\x02}" + value + b"K\x01s."


DOUBLING = b"K\x00\x85q\x00" + b"".join(b"h%ch%c\x86q%c" % (n, n, n + 1) for n in range(60)) + b"h\x3c"
DEEP = b"K\x00" + b"\x85" * 1_000_000
SQUARE_TIME = "".join(map(chr, range(0x4E00, 0x4E00 + 20_000)))
BOMBS = {
    "doubling key": key_of(DOUBLING),
    "deep key": key_of(DEEP),
    "doubling value": pickle.dumps({"a": doubling(60)}, 2),
    "bytearray": pickle.dumps({"a": Call(bytearray, 4_000_000_000)}, 2),
    "bytearray of Python 2": b"\x80\x02}X\x01\x00\x00\x00ac__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85Rs.",
    "codec": pickle.dumps({"a": Call(codecs.encode, SQUARE_TIME, "punycode")}, 2),
    "codec behind another argument": pickle.dumps(
        {"a": Call(codecs.encode, "\xe9", "punycode", "latin1")}, 2
    ),
    "sets of one list": pickle.dumps({"a": [Call(set, items) for items in [list(range(2000))] * 1000]}, 2),
    "copies of one text": pickle.dumps(
        {"a": [Call(codecs.encode, text, "latin1") for text in ["x" * 100_000] * 1000]}, 2
    ),
    "list that grows behind a tuple": b"\x80\x02]q\x00\x85q\x01h\x00" + b"(" + b"K\x00" * 9 + b"e0.",
}


def write(path, pickled: bytes, *, legacy: bool):
    """Put a pickle where PyTorch expects the content of a file."""
    torch.save({}, path, _use_new_zipfile_serialization=not legacy)
    raw = path.read_bytes()
    empty = pickle.dumps({}, 2)
    if legacy:
        raw = raw[::-1].replace(pickle.dumps([], 2)[::-1], b"", 1)[::-1]
        assert raw.endswith(empty)
        path.write_bytes(raw.removesuffix(empty) + pickled + pickle.dumps([], 2))
        return path
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, pickled if name.endswith("data.pkl") else data)
    return path


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_are_refused_in_one_sentence(bomb, legacy, tmp_path):
    path = write(tmp_path / "bomb.pth", BOMBS[bomb], legacy=legacy)
    with pytest.raises(WeightsError) as caught:
        open_file(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    assert ("nested without end" in message) != ("could run code or fill the memory" in message)


def test_a_repeating_tensor_is_not_written_out(tmp_path):
    repeating = torch.zeros(1).expand(100, 100)
    call = Call(torch._utils._rebuild_device_tensor_from_cpu_tensor, repeating, torch.float64, "cpu", False)
    torch.save({"a": call}, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match="_rebuild_device_tensor_from_cpu_tensor"):
        open_file(tmp_path / "a.pth")


def test_a_second_record_in_other_letters_is_looked_at(tmp_path):
    path = write(tmp_path / "a.pth", pickle.dumps({}, 2), legacy=False)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("a/DATA.PKL", BOMBS["doubling key"])
    with pytest.raises(WeightsError, match="nested without end"):
        open_file(path)


def honest() -> dict:
    """What checkpoints of this project and of others hold."""
    model = tiny()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 3, 28, 28)).sum().backward()
    optimizer.step()
    shared = torch.ones(3)
    return {
        "model": model.state_dict(),
        "same": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "args": argparse.Namespace(arch="vit_small", betas=(0.9, numpy.float64(0.99)), crops=[[224], [98]]),
        "numbers": [numpy.float32(1.5), numpy.int64(7), numpy.bool_(True)],
        "tied": OrderedDict(a=shared, b=shared, c=torch.nn.Parameter(shared)),
        "kinds": [b"\xff\x00bytes", {1, 2}, 1 + 2j, torch.Size([1, 2]), torch.float16, torch.device("cpu")],
        "keys": {(1, (2, "x")): None, -(2**40): [], "long": list(range(100_000))},
    }


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("protocol", [2, 3])
def test_honest_files_are_read_as_before(protocol, legacy, tmp_path):
    saved = honest()
    if protocol == 3:  # in which PyTorch itself reads no bytes, and so no NumPy numbers
        saved |= {"args": None, "numbers": None, "kinds": saved["kinds"][1:]}
    path = tmp_path / "a.pth"
    torch.save(saved, path, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    read = read_file(path)
    for name, tensor in saved["model"].items():
        assert torch.equal(read["model"][name], tensor) and torch.equal(read["same"][name], tensor)
    for number, state in saved["optimizer"]["state"].items():
        assert torch.equal(read["optimizer"]["state"][number]["exp_avg"], state["exp_avg"])
    for name in ("args", "numbers", "kinds", "keys"):
        assert read[name] == saved[name]


def test_depth_is_counted_to_the_level():
    for levels in (MAX_DEPTH - 2, MAX_DEPTH - 1, MAX_DEPTH):
        stream = io.BytesIO(key_of(b"K\x00" + b"\x85" * (levels - 1)))
        if levels < MAX_DEPTH:
            check_pickle(stream)
            assert not stream.read()
        else:
            with pytest.raises(pickle.UnpicklingError, match="levels"):
                check_pickle(stream)
