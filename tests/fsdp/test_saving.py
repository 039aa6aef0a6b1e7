"""Saves beside the training, saves that fail, and folders that are not what they seem."""

import contextlib
import errno
import logging
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import nn

from dinov2 import cli, distributed
from dinov2.errors import OutputError, WeightsError
from dinov2.fsdp import FSDPCheckpointer, consolidate, layout, read_checkpoint
from tests.checkpoints import damage, read_state
from tests.conftest import REPO
from tests.distributed.launch import run_in_processes


def build(seed=0, width=8):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, width), nn.Linear(width, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model(torch.ones(3, 4)).sum().backward()
    optimizer.step()
    return model, optimizer


def saver_of(folder, seed=0, width=8, **options):
    model, optimizer = build(seed, width)
    return FSDPCheckpointer(model, str(folder), optimizer=optimizer, **options)


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


@contextlib.contextmanager
def mounted(folder, *options):
    """A small file system of its own, where this process may mount one."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_training_goes_on_while_the_state_of_the_moment_is_written(tmp_path, monkeypatch):
    may_write, order = threading.Event(), []
    original = layout.describe_files

    def slow(*arguments):
        assert may_write.wait(60)
        order.append("written")
        return original(*arguments)

    monkeypatch.setattr(layout, "describe_files", slow)
    saver = saver_of(tmp_path, asynchronous=True)
    expected = {name: value.clone() for name, value in saver.model.state_dict().items()}
    saver.save("model_0000001", iteration=1)
    order.append("trained on")
    with torch.no_grad():
        for parameter in saver.model.parameters():
            parameter.zero_()
    may_write.set()
    outcome = saver.wait()
    assert order == ["trained on", "written"]
    assert outcome.problem == "" and outcome.stalled_seconds < outcome.seconds
    stored = read_state(tmp_path / "model_0000001")["model"]
    assert all(torch.equal(stored[name], value) for name, value in expected.items())


@pytest.mark.slow
def test_a_second_save_waits_for_the_first_and_the_end_of_the_program_for_the_last(tmp_path):
    code = (
        "import sys; from tests.fsdp.test_saving import saver_of\n"
        "saver = saver_of(sys.argv[1], asynchronous=True)\n"
        "for i in range(3): saver.save(f'model_{i:07d}', iteration=i)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=REPO)
    assert (tmp_path / "last_checkpoint.rank_0").read_text() == "model_0000002"
    assert all(read_state(tmp_path / f"model_{i:07d}")["iteration"] == i for i in range(3))


def test_a_full_disk_keeps_the_previous_checkpoint_and_the_run_goes_on(tmp_path, caplog):
    with mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=4m", "tmpfs") as folder:
        saver = saver_of(folder, width=40_000)  # 3 x 1.1 MB
        saver.save("model_0000001", iteration=1)
        assert saver.wait().problem == ""
        saver.save("model_0000005", iteration=5)
        assert "No space left" in saver.wait().problem
        assert names(folder) == ["last_checkpoint.rank_0", "model_0000001"]
        (message,) = [r.message for r in caplog.records if r.levelno == logging.ERROR and r.name == "dinov2"]
        assert "No space left" in message and "the newest good one is model_0000001, 4 iterations" in message
        assert read_state(folder / "model_0000001")["iteration"] == 1
        with pytest.raises(OutputError, match="model_0000005 could not be saved"):
            saver.wait(must_succeed=True)
        with pytest.raises(OutputError, match="MiB left"):
            saver_of(folder, width=400_000).rehearse()
        shutil.rmtree(folder / "model_0000001")
        saver.save("model_0000007", iteration=7)
        assert saver.wait(must_succeed=True).problem == ""


def test_a_target_that_has_become_read_only_is_survived_and_refused_at_the_start(tmp_path):
    with mounted(tmp_path / "target", "-t", "tmpfs", "-o", "size=8m", "tmpfs") as folder:
        saver = saver_of(folder)
        saver.save("model_0000001", iteration=1)
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        saver.save("model_0000002", iteration=2)
        assert "Read-only file system" in saver.wait().problem
        assert saver.resume_or_load()["iteration"] == 1
        with pytest.raises(OutputError, match="cannot be written"):
            saver.rehearse()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_folder_that_another_run_has_taken_is_not_written_and_the_run_stops(tmp_path, asynchronous):
    def refuse():
        raise OutputError("another run has taken over")

    saver = saver_of(tmp_path, may_write=refuse, asynchronous=asynchronous)
    stops = pytest.raises(OutputError, match="stops without saving model_0000001: another run has taken over")
    if asynchronous:
        saver.save("model_0000001", iteration=1)
        with pytest.raises(OutputError, match="stops without saving"):
            saver.wait(must_succeed=True)
        with stops:
            saver.save("model_0000002", iteration=2)
    else:
        with stops:
            saver.save("model_0000001", iteration=1)
    assert names(tmp_path) == []


def test_a_lock_that_cannot_be_read_fails_the_save_only(tmp_path):
    def stale():
        raise OSError(errno.ESTALE, "Stale file handle")

    saver = saver_of(tmp_path, may_write=stale)
    saver.save("model_0000001", iteration=1)
    assert "Stale file handle" in saver.wait().problem
    saver.may_write = lambda: None
    saver.save("model_0000002", iteration=2)
    assert saver.wait(must_succeed=True).problem == ""


def test_any_error_of_a_step_is_told_to_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(layout, "describe_files", lambda *_: {}["of a kind nobody thought of"])
    saver = saver_of(tmp_path)
    saver.save("model_0000001", iteration=1)
    assert "of a kind nobody thought of" in saver.wait().problem and "(process 0)" in saver.wait().problem
    with pytest.raises(OutputError, match="no checkpoint of this run: start again"):
        saver.wait(must_succeed=True)
    assert names(tmp_path) == []


def test_a_checkpoint_whose_tag_cannot_be_written_is_there_and_the_newest(tmp_path, monkeypatch, caplog):
    saver = saver_of(tmp_path)
    saver.save("model_0000001", iteration=1)
    with monkeypatch.context() as patch:
        patch.setattr(saver, "tag_last_checkpoint", _no_space)
        saver.save("model_0000002", iteration=2)
    assert saver.wait(must_succeed=True).problem == ""
    assert "model_0000002 is saved, but not named as the newest" in caplog.text
    assert saver.resume_or_load()["iteration"] == 2


def _no_space(*_):
    raise OutputError("No space left")


def test_what_fails_after_the_renaming_does_not_undo_it(tmp_path, monkeypatch, caplog):
    saver = saver_of(tmp_path)
    monkeypatch.setattr(saver, "_stays", lambda _: 1 / 0)
    saver.save("model_0000001", iteration=1)
    assert saver.wait().problem == "" and "division by zero" in caplog.text
    real, synced = layout.sync_folder, []

    def sync(folder):
        synced.append(folder)
        if folder == tmp_path:
            raise OSError(errno.EIO, "Input/output error")
        real(folder)

    monkeypatch.setattr(layout, "sync_folder", sync)
    saver.save("model_final", iteration=2)
    assert saver.wait().problem == "" and "Input/output error" in caplog.text and tmp_path in synced
    assert saver.resume_or_load()["iteration"] == 2


def test_a_manifest_that_cannot_be_read_just_now_does_not_cost_its_checkpoint(tmp_path, monkeypatch):
    saver = saver_of(tmp_path, max_to_keep=1)
    saver.save("model_0000001", iteration=1)
    real = Path.read_bytes

    def read(path):
        if path.parent.name == "model_0000001":
            raise OSError(errno.ESTALE, "Stale file handle")
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", read)
        for iteration in (2, 3):
            saver.save(f"model_{iteration:07d}", iteration=iteration)
    assert names(tmp_path) == ["last_checkpoint.rank_0", "model_0000001", "model_0000003"]


def test_another_process_that_is_lost_is_told_as_that(tmp_path, monkeypatch):
    saver = saver_of(tmp_path)

    def lost(value):
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(saver._group, "gather", lost)
    saver.save("model_final", iteration=1)
    with pytest.raises(OutputError, match="another process has ended .*Connection closed by peer") as caught:
        saver.wait(must_succeed=True)
    assert "see why that process ended" in str(caught.value) and "space" not in str(caught.value)


def test_a_name_that_exists_is_replaced_and_a_kill_in_between_loses_nothing(tmp_path):
    saver = saver_of(tmp_path)
    saver.save("model_final", iteration=1)
    saver.save("model_final", iteration=2)
    assert names(tmp_path) == ["last_checkpoint.rank_0", "model_final"]
    assert read_state(tmp_path / "model_final")["iteration"] == 2
    # The moment between the two renames.
    (tmp_path / "model_final").rename(tmp_path / ".model_final.old")
    (tmp_path / ".model_final.tmp").mkdir()
    assert saver.resume_or_load()["iteration"] == 2
    saver.save("model_0000001", iteration=1)
    assert names(tmp_path) == ["last_checkpoint.rank_0", "model_0000001", "model_final"]


def test_a_clock_that_goes_backwards_changes_nothing(tmp_path, monkeypatch):
    for iteration, clock in ((3, 2e9), (4, 1e9), (5, 1.5e9)):
        monkeypatch.setattr(time, "time", lambda clock=clock: clock)
        saver = saver_of(tmp_path, max_to_keep=2)
        saver.save(f"model_{iteration:07d}", iteration=iteration)
        for path in (tmp_path / f"model_{iteration:07d}").iterdir():
            os.utime(path, (clock, clock))
        os.utime(tmp_path / f"model_{iteration:07d}", (clock, clock))
    assert names(tmp_path) == ["last_checkpoint.rank_0", "model_0000004", "model_0000005"]
    (tmp_path / "last_checkpoint.rank_0").unlink()
    assert saver.resume_or_load()["iteration"] == 5


class Unsafe:
    def __reduce__(self):
        return os.mkdir, (os.environ["PROOF"],)


def test_an_index_with_code_is_not_run_even_with_a_manifest_that_fits(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("PROOF", str(tmp_path / "proof"))
    saver = saver_of(tmp_path / "run")
    for iteration in (1, 2):
        saver.save(f"model_{iteration:07d}", iteration=iteration)
    folder = tmp_path / "run" / "model_0000002"
    (folder / ".metadata").write_bytes(pickle.dumps(Unsafe()))
    manifest = layout.read_manifest(folder)
    files = {**manifest.files, **layout.describe_files(folder, [".metadata"])}
    layout.write_manifest(folder, layout.Manifest(**{**vars(manifest), "files": files}))
    assert saver.resume_or_load()["iteration"] == 1
    assert "can not be read safely" in caplog.text and not (tmp_path / "proof").exists()
    with pytest.raises(WeightsError, match="posix.mkdir"):
        read_checkpoint(folder)


def test_one_file_of_a_folder_restarts_a_run(tmp_path, capsys):
    saver = saver_of(tmp_path / "run")
    saver.save("model_final", iteration=7)
    target = tmp_path / "old" / "model_final.rank_0.pth"
    cli.run(consolidate.main, [str(tmp_path / "run" / "model_final"), str(target)])
    assert "wrote" in capsys.readouterr().out
    old = torch.load(target, weights_only=True)
    assert old["optimizer"]["param_groups"][0]["params"] == [0, 1, 2, 3]
    other = saver_of(tmp_path / "old", seed=1)
    assert other.resume_or_load() == {"iteration": 7}
    assert torch.equal(other.model[0].weight, saver.model[0].weight)
    first, second = (s.checkpointables["optimizer"].state_dict()["state"] for s in (saver, other))
    assert all(torch.equal(first[0][key], second[0][key]) for key in ("step", "exp_avg", "exp_avg_sq"))
    # The next checkpoint of such a run is a folder, and the newer one.
    other.save("model_0000009", iteration=9)
    assert other.resume_or_load()["iteration"] == 9
    damage(tmp_path / "run" / "model_final")
    with pytest.raises(WeightsError, match="SHA-256"):
        consolidate.consolidate(tmp_path / "run" / "model_final", target)


def _save_together(folder):
    """Training's collectives go on while a save runs; a failure of one process is that of all."""
    rank = distributed.get_global_rank()
    saver = saver_of(folder, asynchronous=True)
    assert saver._group.group._get_backend(torch.device("cpu")).options._timeout > timedelta(days=1)
    torch.manual_seed(rank)
    drawn = torch.rand(3)  # after the generators were stored
    torch.manual_seed(rank)
    saver.save("model_0000001", iteration=1)
    total = sum(distributed.all_reduce_sum_(torch.ones(1)).item() for _ in range(200))
    first = saver.wait().problem
    same_numbers = saver.resume_or_load()["iteration"] == 1 and torch.equal(torch.rand(3), drawn)
    if rank == 1:
        saver._stage.copy = _fail
    saver.save("model_0000002", iteration=2)
    second = saver.wait().problem
    try:
        saver.wait(must_succeed=True)
        raised = False
    except OutputError:
        raised = True
    saver.close()
    return total, first, same_numbers, second, raised


def _fail(*_):
    raise RuntimeError("no memory for the copies")


@pytest.mark.slow
def test_two_processes_save_beside_their_training_and_fail_together(tmp_path):
    outcomes = run_in_processes(_save_together, str(tmp_path))
    for total, first, same_numbers, second, raised in outcomes:
        assert (total, first, same_numbers, raised) == (400.0, "", True, True)
        assert second == "no memory for the copies (process 1)"
    assert names(tmp_path) == ["last_checkpoint.rank_0", "model_0000001"]
    manifest = layout.read_manifest(tmp_path / "model_0000001")
    sizes = [manifest.files[f"__{rank}_0.distcp"]["bytes"] for rank in range(2)]
    assert min(sizes) > 0.3 * max(sizes)  # replicated tensors are written once, by turns
    assert read_state(tmp_path / "model_0000001")["iteration"] == 1
