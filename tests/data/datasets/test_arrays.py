"""Packed strings and files written in one piece."""

import os
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinov2.data.datasets.arrays import IndexArray, PackedStrings, atomic_file, save_array
from dinov2.errors import DatasetError


@settings(max_examples=60, deadline=None)
@given(st.lists(st.binary(max_size=20)))
def test_packed_strings_hold_any_names(names):
    strings = [os.fsdecode(name) for name in names]
    packed = pickle.loads(pickle.dumps(PackedStrings(strings)))
    assert len(packed) == len(strings)
    assert [packed[index] for index in range(len(strings))] == strings
    if strings:
        assert packed[-1] == strings[-1]
    with pytest.raises(IndexError):
        packed[len(strings)]


def test_atomic_file(tmp_path):
    path = tmp_path / "new" / "file"
    with atomic_file(str(path)) as file:
        file.write(b"one")
        assert not path.exists()
    with pytest.raises(KeyError), atomic_file(str(path)) as file:
        file.write(b"two")
        raise KeyError
    assert list(path.parent.iterdir()) == [path]
    assert path.read_bytes() == b"one"


def test_save_array(tmp_path):
    save_array(str(tmp_path / "a.npy"), np.arange(3))
    assert np.load(tmp_path / "a.npy").tolist() == [0, 1, 2]


def test_a_copy_of_an_index_refuses_another_file(tmp_path):
    """What a worker gets that is started after the index was built again, under the same name and size."""
    path = str(tmp_path / "a.npy")
    save_array(path, np.arange(3))
    unused = pickle.dumps(IndexArray(path, ""))
    original = IndexArray(path, "")
    assert original.get().tolist() == [0, 1, 2]
    copy = pickle.loads(pickle.dumps(original))
    assert copy.get().tolist() == [0, 1, 2]
    passed_on = pickle.dumps(pickle.loads(pickle.dumps(original)))
    save_array(path, np.arange(3, 6))
    for late in (pickle.loads(pickle.dumps(original)), pickle.loads(passed_on)):
        with pytest.raises(DatasetError, match=r"a\.npy\" was rebuilt since .*: start again$"):
            late.get()
    assert original.get().tolist() == [0, 1, 2]
    assert pickle.loads(unused).get().tolist() == [3, 4, 5]
    original.drop()
    assert original.get().tolist() == [3, 4, 5]
