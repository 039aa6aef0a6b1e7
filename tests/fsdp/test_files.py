"""Single checkpoint files: written whole or not at all, read only when safe and undamaged."""

import os
import pickle

import pytest
import torch

from dinov2.errors import OutputError, WeightsError
from dinov2.fsdp import files


def write(path, state):
    files.write_atomically(path, lambda file: torch.save(state, file))


def test_what_is_written_is_read_back(tmp_path):
    path = tmp_path / "new" / "state.pth"
    write(path, {"weights": torch.arange(6.0).reshape(2, 3), "iteration": 7, "name": "x"})
    for read in (files.read, files.read_verified):
        state = read(path)
        assert torch.equal(state["weights"], torch.arange(6.0).reshape(2, 3))
        assert (state["iteration"], state["name"]) == (7, "x")
    assert [p.name for p in path.parent.iterdir()] == ["state.pth"]


def test_a_write_that_fails_half_way_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "state.pth"
    write(path, {"iteration": 1})

    def fail(file):
        file.write(b"half")
        raise OSError("No space left on device")

    with pytest.raises(OutputError, match=r"state\.pth cannot be written \(No space left on device\)"):
        files.write_atomically(path, fail)
    assert files.read(path) == {"iteration": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["state.pth"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file/state.pth cannot be written"):
        write(tmp_path / "file" / "state.pth", {})


def test_a_kill_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "state.pth"
    write(path, {"iteration": 1})

    def die(file):
        file.write(b"half")
        file.flush()
        os._exit(9)

    child = os.fork()
    if child == 0:
        files.write_atomically(path, die)
    os.waitpid(child, 0)
    assert files.read_verified(path) == {"iteration": 1}
    assert files.temporary_name(path).is_file()  # what a kill cannot clean up, the next save does


class Unsafe:
    def __reduce__(self):
        return os.system, ("true",)


@pytest.mark.parametrize(
    "content",
    [b"", b"hello, I am text", pickle.dumps({"a": Unsafe()}, 2), pickle.dumps([1, 2], 2)],
    ids=["empty", "text", "unsafe pickle", "list"],
)
def test_foreign_files_are_refused(tmp_path, content):
    path = tmp_path / "state.pth"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"state\.pth"):
        files.read(path)
    with pytest.raises(WeightsError, match=r"state\.pth"):
        files.read_verified(path)


def test_a_pickled_object_is_refused_and_the_reason_given(tmp_path):
    path = tmp_path / "state.pth"
    torch.save({"model": torch.nn.Linear(2, 2)}, path)
    with pytest.raises(WeightsError, match="refused because loading them could run code"):
        files.read(path)


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(WeightsError, match=r"none\.pth does not exist"):
        files.read(tmp_path / "none.pth")


def test_a_truncated_file_and_a_changed_byte_are_found(tmp_path):
    path = tmp_path / "state.pth"
    write(path, {"weights": torch.randn(100, 100)})
    good = path.read_bytes()
    path.write_bytes(good[: len(good) // 2])
    with pytest.raises(WeightsError, match="damaged or incomplete"):
        files.read_verified(path)
    path.write_bytes(good[:20_000] + bytes([good[20_000] ^ 1]) + good[20_001:])
    files.read(path)  # PyTorch alone does not notice
    with pytest.raises(WeightsError, match="checksum of .* does not match"):
        files.read_verified(path)
