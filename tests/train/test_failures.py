"""What befalls a run: signals, processes that die or hang, and steps that are not finite; all for real."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from datetime import timedelta
from itertools import count
from pathlib import Path

import pytest
import torch

from dinov2 import cli
from dinov2.cli import EXIT_START_AGAIN
from dinov2.errors import Interrupted
from dinov2.train import loop, watchdog
from dinov2.train.monitoring.judge import Decision
from dinov2.train.monitoring.monitor import Monitor
from dinov2.train.preemption import SIGNALS, StopRequest
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.train.step import NonFiniteLossError
from dinov2.train.watchdog import ENDED, FAILED, VERDICT, Observation, Record, Watchdog, judge
from tests.checkpoints import read_state
from tests.conftest import REPO
from tests.distributed.launch import free_port, torchrun_variables

WORKER = str(REPO / "tests/train/failure_worker.py")
QUIET = ("train.self_check=off", "evaluation.eval_period_iterations=0")


def words(run, output_dir, *overrides):
    return [
        *("--config-file", str(run.config), "--output-dir", str(output_dir)),
        *(f"train.dataset_path={run.dataset}", *QUIET, *overrides),
    ]


def environment(**variables):
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO), **variables}


class Processes:
    """The trainer in processes of its own, as srun would start them; what each does is set by variables."""

    def __init__(self, run, output_dir, *overrides, count=2, **variables):
        port = free_port()
        self.output_dir = output_dir
        self.members = [
            subprocess.Popen(
                [sys.executable, WORKER, *words(run, output_dir, *overrides)],
                env=environment(**variables, **(torchrun_variables(rank, count, port) if count > 1 else {})),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(count)
        ]

    def await_iteration(self, number):
        """Wait until the log has the line of an iteration, which is written after it."""
        metrics = Path(self.output_dir, "training_metrics.json")
        for _ in range(3000):
            if metrics.exists() and len(metrics.read_text().splitlines()) > number:
                return
            assert all(member.poll() is None for member in self.members), self.finish()
            time.sleep(0.05)
        pytest.fail("no progress")

    def finish(self):
        """Return (status, errors) of each."""
        outcomes = [(member, *member.communicate(timeout=200)) for member in self.members]
        return [(member.returncode, errors) for member, _, errors in outcomes]


def state(folder, name="model_final"):
    return read_state(Path(folder) / name)


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def checkpoints(folder):
    return sorted(path.name for path in Path(folder).glob("model_*"))


LONG = ("optim.max_iterations=12", "checkpointing.period=100")


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_saves_and_the_run_goes_on_as_if_nothing_had_been(tiny, tmp_path, number):
    processes = Processes(tiny, tmp_path / "run", *LONG, "train.num_workers=1", count=1, PACE="0.3")
    processes.await_iteration(2)
    processes.members[0].send_signal(number)
    ((status, errors),) = processes.finish()
    assert status == EXIT_START_AGAIN, errors
    assert f"stopped: the signal {number.name} came; the run is saved after iteration" in errors
    (saved,) = checkpoints(tmp_path / "run")
    assert saved != "model_final"

    tiny.start(tmp_path / "run", *QUIET, *LONG)
    tiny.start(tmp_path / "whole", *QUIET, *LONG)
    assert same(state(tmp_path / "run")["model"], state(tmp_path / "whole")["model"])


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_torchrun_passes_signals_on_and_two_processes_stop_together(tiny, tmp_path, number):
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        *("--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1,SIGUSR2", WORKER),
        *words(tiny, tmp_path / "run", *LONG, "train.num_workers=1"),
    ]
    launcher = subprocess.Popen(command, env=environment(PACE="0.3"), stderr=subprocess.PIPE, text=True)
    Processes.await_iteration(type("Run", (), {"output_dir": tmp_path / "run", "members": [launcher]}), 2)
    launcher.send_signal(number)
    _, errors = launcher.communicate(timeout=200)
    # torchrun itself reports the signal in its own way; its workers have saved.
    assert launcher.returncode != 0
    assert f"stopped: the signal {number.name} came; the run is saved" in errors, errors[-3000:]
    (saved,) = checkpoints(tmp_path / "run")
    assert saved != "model_final"


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_after_the_same_step(tiny, tmp_path):
    processes = Processes(tiny, tmp_path / "run", *LONG, PACE="0.3")
    processes.await_iteration(2)
    processes.members[1].send_signal(signal.SIGUSR1)
    outcomes = processes.finish()
    assert [status for status, _ in outcomes] == [EXIT_START_AGAIN] * 2, outcomes
    (first, second) = [errors.splitlines()[-1] for _, errors in outcomes]
    assert first == second
    assert first.startswith("stopped: the signal SIGUSR1 came; the run is saved after iteration")
    for folder in ("run", "whole"):
        done = Processes(tiny, tmp_path / folder, *LONG).finish()
        assert [status for status, _ in done] == [0, 0], done
    assert same(state(tmp_path / "run")["model"], state(tmp_path / "whole")["model"])


def test_a_signal_before_the_first_step_stops_with_nothing_saved(tiny, tmp_path, monkeypatch):
    from dinov2.train import train

    real = train.build_dataset

    def signalled(cfg):
        os.kill(os.getpid(), signal.SIGUSR2)
        return real(cfg)

    monkeypatch.setattr(train, "build_dataset", signalled)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    with pytest.raises(Interrupted, match=r"SIGUSR2 came before the first step") as caught:
        tiny.start(tmp_path / "run")
    assert caught.value.signal_number == signal.SIGUSR2
    assert {number: signal.getsignal(number) for number in SIGNALS} == before
    assert not checkpoints(tmp_path / "run")


def test_a_signal_during_the_evaluation_of_the_start_stops_with_nothing_saved(tiny, tmp_path, monkeypatch):
    def signalled(self, *arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return Decision()

    monkeypatch.setattr(Monitor, "begin", signalled)
    monkeypatch.setattr(loop, "train_step", None)
    with pytest.raises(Interrupted, match=r"SIGTERM came before the first step"):
        tiny.start(tmp_path / "run", "evaluation.monitor_period=2")
    assert not checkpoints(tmp_path / "run")


def test_a_signal_during_a_step_saves_after_it_and_the_run_goes_on(tiny, tmp_path, monkeypatch):
    real, calls = loop.train_step, count()

    def signalled(*arguments, **options):
        if next(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments, **options)

    monkeypatch.setattr(loop, "train_step", signalled)
    options = (*QUIET, "checkpointing.period=100")
    with pytest.raises(Interrupted, match=r"SIGTERM came; the run is saved after iteration [23]"):
        tiny.start(tmp_path / "run", *options)
    assert len(checkpoints(tmp_path / "run")) == 1
    tiny.start(tmp_path / "run", *options)
    tiny.start(tmp_path / "whole", *options)
    assert same(state(tmp_path / "run")["model"], state(tmp_path / "whole")["model"])


def test_the_second_ctrl_c_ends_at_once():
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested and stop.agreed_signal() == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.slow
def test_loader_workers_ignore_what_the_whole_job_is_sent_but_end_with_their_parent(tiny, tmp_path):
    processes = Processes(
        tiny, tmp_path / "run", *LONG, "train.num_workers=1", count=1, PACE="0.3", SIGNAL_WORKERS="1"
    )
    ((status, errors),) = processes.finish()
    assert status == 0, errors
    pid = int((tmp_path / "run" / "worker.pid").read_text())
    processes = Processes(tiny, tmp_path / "again", *LONG, "train.num_workers=1", count=1, SLEEP="3 999")
    for _ in range(1000):
        if (tmp_path / "again" / "sleeping").exists():
            break
        time.sleep(0.05)
    pid = int((tmp_path / "again" / "sleeping").read_text())
    processes.members[0].kill()
    processes.members[0].wait()
    for _ in range(600):
        if not Path(f"/proc/{pid}").exists() or ") Z" in Path(f"/proc/{pid}/stat").read_text():
            return
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the worker outlived the trainer")


SHORT_PATIENCE = "train.process_timeout=5"


@pytest.mark.slow
def test_a_process_stuck_in_its_data_is_named(tiny, tmp_path):
    processes = Processes(tiny, tmp_path / "run", *LONG, SHORT_PATIENCE, SLEEP="13 999", ON_RANK="1")
    outcomes = processes.finish()
    for status, errors in outcomes:
        assert status == 1
        assert "error: rank 1 (process" in errors and "has kept the others waiting for" in errors
        assert "it is waiting for the data of iteration 3" in errors


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_process_is_named(tiny, tmp_path, rank):
    processes = Processes(tiny, tmp_path / "run", *LONG, SHORT_PATIENCE, PACE="0.2")
    processes.await_iteration(1)
    stopped = processes.members[rank]
    stopped.send_signal(signal.SIGSTOP)
    other = processes.members[1 - rank]
    _, errors = other.communicate(timeout=120)
    stopped.kill()
    stopped.communicate()
    assert other.returncode == 1, errors
    assert f"rank {rank} (process {stopped.pid} on " in errors, errors
    assert "answer" in errors and "it is stopped" in errors or "is stopped; that rank was" in errors


@pytest.mark.slow
@pytest.mark.parametrize("rank", [1, 0])
def test_a_killed_process_is_named(tiny, tmp_path, rank):
    processes = Processes(tiny, tmp_path / "run", *LONG, PACE="0.2")
    processes.await_iteration(1)
    killed, other = processes.members[rank], processes.members[1 - rank]
    killed.kill()
    _, errors = other.communicate(timeout=120)
    assert other.returncode == 1
    assert f"error: rank {rank} (process {killed.pid} on " in errors, errors
    assert "has died; it was" in errors


@pytest.mark.slow
def test_an_error_of_one_process_is_told_by_the_others(tiny, tmp_path):
    outcomes = Processes(tiny, tmp_path / "run", *LONG, FAIL="13", ON_RANK="1").finish()
    assert [status for status, _ in outcomes] == [1, 1]
    assert "error: rank 1 (process" in outcomes[0][1], outcomes[0][1]
    assert "has stopped with an error while waiting for the data of iteration 3" in outcomes[0][1]
    assert "no such luck" in outcomes[0][1]


@pytest.mark.slow
def test_torchrun_starts_again_after_a_kill_and_the_result_is_the_same(tiny, tmp_path):
    options = ("optim.max_iterations=12", "checkpointing.period=3")
    for folder, variables in (("whole", {}), ("run", {"KILL": "5", "ON_RANK": "1"})):
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *("--max-restarts=1", WORKER, *words(tiny, tmp_path / folder, *options)),
        ]
        done = subprocess.run(command, env=environment(**variables), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    assert "loaded the run state from" in (tmp_path / "run" / "logs" / "log.txt").read_text()
    assert same(state(tmp_path / "run")["model"], state(tmp_path / "whole")["model"])


def observe(rank, *, phase=5, beat_at=100.0, phase_at=100.0, **record):
    process = {"pid": 10 + rank, "host": "node"}
    return Observation(
        Record(rank, process, phase_number=phase, phase="here", **record), beat_at, phase_at, 100.0
    )


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ({}, ""),
        ({"phase_at": 0.0}, ""),  # long in one phase, but nobody is further
        ({"phase": 4, "phase_at": 96.0}, ""),
        ({"phase": 4, "phase_at": 95.0}, "rank 1 (process 11 on node) has kept the others waiting for 10 s"),
        ({"beat_at": 95.0}, "rank 1 (process 11 on node) has not answered for 10 s"),
        ({"state": FAILED, "why": "bad luck"}, ""),  # the others may find the same mistake
        ({"state": "ended", "phase": 1, "beat_at": 0.0, "phase_at": 0.0}, ""),
    ],
)
def test_who_is_to_blame(other, expected):
    found = judge(
        [observe(0, beat_at=105.0), observe(1, **{"beat_at": 105.0} | other)],
        105.0,
        10.0,
        alive=lambda process: True,
    )
    assert found.startswith(expected) if expected else found == ""


def test_the_dead_are_named_before_those_who_failed_because_of_them():
    members = [observe(0, state=FAILED, why="lost"), observe(1)]
    found = judge(members, 200.0, 1e9, alive=lambda process: process["pid"] != 11)
    assert found == "rank 1 (process 11 on node) has died; it was here"


def watch_over_two(limit=1800.0):
    """The watchdog of rank 0 with a store in this process, in which rank 1 of another machine is running."""
    watch = Watchdog(limit)
    watch._store, watch._keys = torch.distributed.HashStore(), ["rank_0", "rank_1"]
    watch._store.set(VERDICT, "")
    watch._write()
    answer(watch._store, 0)
    watch._observed = watch._first_look()
    return watch


def answer(store, beat, state="running"):
    record = Record(1, {"pid": 11, "host": "another"}, beat=beat, phase="here", state=state)
    store.set("rank_1", json.dumps(asdict(record)))


def test_who_waits_to_hear_why_a_collective_failed_waits_until_a_silence_tells():
    watch, waited = watch_over_two(), []

    def wait(seconds):
        waited.append(seconds)
        later = max(seen.beat_at for seen in watch._observed) + seconds
        watch._observed[0].beat_at = later  # its own thread goes on
        watch._verdict = judge(watch._observed, later, watch.limit, silence=watch.urgent_silence)

    watch._judged.wait = wait
    told = watch._explain(RuntimeError("gloo: connection closed by peer"))
    assert told.startswith("rank 1 (process 11 on another) has not answered for 33 s")
    assert waited == [33.0]


@pytest.mark.parametrize("answers", [True, False])
def test_all_are_said_to_answer_only_if_they_do(answers):
    watch = watch_over_two()

    def wait(seconds):
        answer(watch._store, int(answers))
        watch._write()
        for seen, record in zip(watch._observed, watch._read()[1], strict=True):
            seen.update(record, time.monotonic())

    watch._judged.wait = wait
    told = watch._explain(RuntimeError("gloo: connection closed by peer"))
    assert "the processes lost each other" in told
    assert ("though all of them still answer" in told) == answers


STORE = """
import sys, time
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", int(sys.argv[1]), is_master=True, wait_for_workers=False)
print("ready", flush=True)
time.sleep(600)
"""


def test_a_store_that_does_not_answer_is_not_waited_for():
    port = free_port()
    server = subprocess.Popen([sys.executable, "-c", STORE, str(port)], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout.readline() == "ready\n"
        short = timedelta(seconds=0.5)
        store = torch.distributed.TCPStore("127.0.0.1", port, is_master=False, timeout=short)
        patience = watchdog.Patience(1.0)
        patience.call(store.set, "key", "value")
        assert patience.call(store.multi_get, ["key"]) == [b"value"]
        server.send_signal(signal.SIGSTOP)
        os.waitpid(server.pid, os.WUNTRACED)  # until it has stopped: before that it may answer
        with pytest.raises((TimeoutError, RuntimeError)):
            patience.call(store.multi_get, ["key"])
        with pytest.raises((TimeoutError, RuntimeError)):
            patience.call(store.multi_get, ["key"])
    finally:
        server.kill()
        server.communicate()


def test_no_phase_is_lost_to_the_thread_that_writes(monkeypatch):
    watch, done = watch_over_two(), threading.Event()

    def slow(record, **changes):
        time.sleep(0.001)  # lets the other thread run
        return replace(record, **changes)

    def write():
        while not done.is_set():
            watch._write()

    monkeypatch.setattr(watchdog, "replace", slow)
    writer = threading.Thread(target=write)
    writer.start()
    for number in range(50):
        watch.phase(f"at {number}")
    done.set()
    writer.join()
    assert watch._record.phase_number == 50


@pytest.mark.parametrize("launcher_holds_the_store", [False, True])
def test_who_fails_alone_with_the_store_stays_until_the_others_have_heard(
    monkeypatch, launcher_holds_the_store
):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", str(launcher_holds_the_store))
    watch, reads = watch_over_two(), []

    def read():
        reads.append(Watchdog._read(watch))
        if len(reads) == 2:
            answer(watch._store, 1, ENDED)
        return reads[-1]

    watch._read = read
    watch._farewell(FAILED, "bad luck")
    assert len(reads) == (0 if launcher_holds_the_store else 3)
    assert Watchdog._read(watch)[1][0].why == "bad luck"


def test_who_gives_up_says_that_it_leaves(monkeypatch):
    watch, told = watch_over_two(), []
    monkeypatch.setattr(cli, "abandon", told.append)
    watch._verdict = "rank 1 has stopped with an error"
    watch._give_up(reachable=True)
    assert watch._read()[1][0].state == ENDED
    assert told[0].startswith("rank 1 has stopped with an error; all processes stop")


def rows(folder):
    return [json.loads(line) for line in (folder / "training_metrics.json").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_a_bad_batch_is_skipped_and_counted(tiny, tmp_path, count):
    options = ("optim.max_iterations=6", "checkpointing.period=1", "checkpointing.max_to_keep=10")
    run = Processes(
        tiny, tmp_path / "run", *options, count=count, POISON="13", ON_RANK=str(count - 1)
    )  # the fourth batch of the last rank
    outcomes = run.finish()
    assert {status for status, _ in outcomes} == {0}, outcomes
    log = (tmp_path / "run" / "logs" / "log.txt").read_text()
    assert "iteration 3: the step is skipped, because a loss is not finite" in log
    final = state(tmp_path / "run")
    assert final["metrics"]["skipped_steps"]["total"] == 1
    assert final["metrics"]["total_loss"]["count"] == 5
    assert all(value.isfinite().all() for value in final["model"].values())
    assert "model_0000003" not in checkpoints(tmp_path / "run")
    assert "model_0000004" in checkpoints(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_the_run_goes_back_once_and_then_stops_with_a_diagnosis(tiny, tmp_path, count):
    options = ("optim.max_iterations=30", "checkpointing.period=2", "train.max_bad_steps=2")
    last = str(count - 1)
    outcomes = Processes(tiny, tmp_path / "run", *options, count=count, POISON="21-", ON_RANK=last).finish()
    assert {status for status, _ in outcomes} == {1}, outcomes
    log = (tmp_path / "run" / "logs" / "log.txt").read_text()
    # Batches of 4: the sixth (iteration 5) is the first bad one, the checkpoint of iteration 3 the last good.
    assert "iteration 6: the last 2 steps were skipped" in log
    assert "The run goes back to iteration 4, and on with the data behind the failed batches" in log
    errors = outcomes[0][1]
    assert "error: iteration 5: the last 2 steps were skipped, because a loss is not finite" in errors
    assert f"computed again, on rank {last} the batch itself (collated_global_crops" in errors
    assert "then the output of the module teacher.backbone.patch_embed.proj" in errors
    assert "nest/" in errors and "once already" in errors
    found = json.loads((tmp_path / "run" / "nonfinite_5.json").read_text())["ranks"]
    assert [bool(rank["inputs"]) for rank in found] == [False] * (count - 1) + [True]
    assert all(len(rank["images"]) == 4 for rank in found)


def test_a_gradient_is_traced_to_its_module(tiny, tmp_path):
    options = ("optim.max_iterations=6", "train.max_bad_steps=1")
    with pytest.raises(NonFiniteLossError) as caught:
        from tests.train import failure_worker

        failure_worker.poison_gradient("backbone.blocks.1.mlp.fc1", tiny, tmp_path / "run", *QUIET, *options)
    assert "there is no checkpoint to go back to" in str(caught.value)
    assert "the gradient at student.backbone.blocks.1.mlp.fc1" in str(caught.value)


def test_a_fault_of_one_moment_is_not_blamed_on_the_batch(tiny, tmp_path, monkeypatch):
    real, calls = SSLMetaArch.backprop_loss, count()

    def faulty_once(model, loss):
        real(model, loss * float("nan") if next(calls) == 0 else loss)

    monkeypatch.setattr(SSLMetaArch, "backprop_loss", faulty_once)
    with pytest.raises(NonFiniteLossError, match="gave finite losses and gradients on every rank"):
        tiny.start(tmp_path / "run", *QUIET, "train.max_bad_steps=1")


def test_skipped_steps_are_counted_since_the_start_of_the_run(tiny, tmp_path, monkeypatch):
    real, calls = loop.train_step, count(1)

    def misbehaving(*arguments, **options):
        number = next(calls)
        if number == 4:
            raise RuntimeError("enough")
        result = real(*arguments, **options)
        return replace(result, problem="a loss is not finite") if number in (2, 6, 7) else result

    monkeypatch.setattr(loop, "train_step", misbehaving)
    run = (tmp_path / "run", *QUIET, "checkpointing.period=1", "train.max_bad_steps=2")
    with pytest.raises(RuntimeError, match="enough"):
        tiny.start(*run)
    for thread in threading.enumerate():
        if thread.name == "checkpoint":  # which the end of a process waits for
            thread.join()
    tiny.start(*run)  # skips iterations 4 and 5, and goes back to 4
    assert "goes back to iteration 4" in (tmp_path / "run" / "logs" / "log.txt").read_text()
    assert [row["skipped_steps"] for row in rows(tmp_path / "run")] == [0, 1, 1, 1, 3, 3]
