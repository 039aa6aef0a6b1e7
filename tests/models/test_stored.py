"""Tensors read on demand: shapes known beforehand, values afterwards, a record of what was done."""

import pytest
import torch

from dinov2.errors import WeightsError
from dinov2.models.stored import StoredTensor, concatenated, derived, stored_content


def counted(tensor, name, reads):
    """A stored tensor that notes in ``reads`` when it is read."""

    def read():
        reads.append(name)
        return tensor

    return StoredTensor(tuple(tensor.shape), tensor.dtype, read, (name,))


def test_a_stored_tensor_says_what_the_tensor_would():
    tensor = torch.nn.Parameter(torch.randn(3, 4, 5).half())
    stored = StoredTensor.of(tensor, "a")
    assert (stored.shape, stored.ndim, stored.numel, stored.nbytes) == ((3, 4, 5), 3, 60, 120)
    assert stored.dtype == torch.float16 and stored.is_floating_point
    assert stored.names == ("a",) and stored.how == ()
    assert torch.equal(stored.read(), tensor) and not stored.read().requires_grad
    scalar = StoredTensor.of(torch.tensor(3), "step")
    assert (scalar.ndim, scalar.numel, scalar.nbytes, scalar.is_floating_point) == (0, 1, 8, False)


def test_conversions_are_recorded_once_and_in_order():
    stored = StoredTensor.of(torch.zeros(2), "a").converted("renamed").converted("cast").converted("renamed")
    assert stored.how == ("renamed", "cast") and stored.names == ("a",)


def test_what_is_derived_is_computed_on_reading_from_all_its_parts():
    reads, one, other = [], torch.randn(4, 3), torch.randn(2, 3)
    parts = [counted(one, "a", reads).converted("renamed"), counted(other, "b", reads)]
    stored = derived(parts, (3, 2), lambda first, second: (first[:2] + second).t(), "added")
    assert (stored.shape, stored.dtype, stored.names) == ((3, 2), torch.float32, ("a", "b"))
    assert stored.how == ("renamed", "added") and reads == []
    assert torch.equal(stored.read(), (one[:2] + other).t()) and reads == ["a", "b"]


def test_a_dictionary_becomes_the_content_of_a_file():
    tensor = torch.zeros(2)
    content = stored_content({"teacher": {"a": tensor}, "iteration": 3})
    assert content["teacher"]["a"].read() is not None and content["teacher"]["a"].names == ("teacher.a",)
    assert content["iteration"] == 3


def test_parts_are_joined_on_reading():
    reads, parts = [], [torch.randn(2, 3), torch.randn(4, 3), torch.randn(1, 3)]
    stored = [
        counted(part, name, reads).converted("renamed") for part, name in zip(parts, "qkv", strict=True)
    ]
    whole = concatenated(stored, "q, k and v joined")
    assert (whole.shape, whole.names, whole.how) == ((7, 3), tuple("qkv"), ("renamed", "q, k and v joined"))
    assert reads == []
    assert torch.equal(whole.read(), torch.cat(parts))
    assert reads == list("qkv")


@pytest.mark.parametrize(
    "other", [torch.zeros(2, 4), torch.zeros(2, 3).half(), torch.zeros(()), torch.zeros(2)]
)
def test_parts_that_do_not_fit_are_refused_before_reading(other):
    reads = []
    with pytest.raises(WeightsError, match=r"differ in width or type \(q \(2, 3\)"):
        concatenated([counted(torch.zeros(2, 3), "q", reads), counted(other, "k", reads)], "joined")
    assert reads == []
