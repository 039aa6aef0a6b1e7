"""The digest over tensors: by hand on a small case, and what it notices."""

import hashlib
import struct

import pytest
import torch

from dinov2.models.digest import tensors_digest


def test_by_hand():
    tensors = {
        "a": torch.tensor([[1.5, -2.0]]),
        "b": torch.tensor([1.5], dtype=torch.bfloat16),
        "c": torch.tensor(7),
        "d": torch.zeros(0, 2, dtype=torch.float16),
    }
    expected = b"a\0float32\0" + b"1,2\0" + struct.pack("<2f", 1.5, -2.0)
    expected += b"b\0bfloat16\0" + b"1\0" + struct.pack("<f", 1.5)[2:]  # the upper half of a float
    expected += b"c\0int64\0\0" + struct.pack("<q", 7)
    expected += b"d\0float16\0" + b"0,2\0"
    assert tensors_digest(tensors.items()) == hashlib.sha256(expected).hexdigest()


def test_layout_in_memory_does_not_matter():
    tensor = torch.arange(12.0).reshape(3, 4)
    strided = tensor.t().contiguous().t()
    assert not strided.is_contiguous()
    parameter = torch.nn.Parameter(tensor)
    digests = {tensors_digest([("a", value)]) for value in (tensor, strided, parameter)}
    assert len(digests) == 1


def test_everything_about_a_tensor_matters():
    base = torch.arange(4.0)
    flipped = base.clone()
    flipped.view(torch.int32)[3] ^= 1
    others = [
        [("b", base)],
        [("a", base.double())],
        [("a", base.view(torch.int32))],
        [("a", base.reshape(2, 2))],
        [("a", flipped)],
        [("a", base), ("b", torch.zeros(0))],
        [],
    ]
    digests = [tensors_digest(items) for items in [[("a", base)], *others]]
    assert len(set(digests)) == len(digests)


@pytest.mark.parametrize("names", [["b", "a"], ["a", "a"]])
def test_names_must_ascend(names):
    with pytest.raises(ValueError, match="sorted by name"):
        tensors_digest((name, torch.zeros(1)) for name in names)


def test_one_tensor_in_memory_at_a_time():
    alive = []

    def items():
        for name in "abc":
            tensor = torch.zeros(10)
            alive.append(torch.utils.weak.WeakTensorKeyDictionary({tensor: name}))
            yield name, tensor
            del tensor
            assert sum(len(kept) for kept in alive[:-1]) == 0

    tensors_digest(items())
    assert len(alive) == 3
