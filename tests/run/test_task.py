"""How a job ends when it is asked to stop, with jobs that really run through submitit on this machine."""

import argparse
import json
import os
import signal
import time
from pathlib import Path

import pytest
import submitit

from dinov2.cli import EXIT_START_AGAIN
from dinov2.errors import Interrupted
from dinov2.run.eval import linear
from dinov2.run.submit import submit_jobs
from dinov2.run.train.train import Trainer
from dinov2.train.output_lock import job_details
from tests.run.conftest import parse
from tests.run.counting import Counter


def starts(folder, rank=0):
    path = folder / f"starts_{rank}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def processes_of(job):
    """The ids of a local job's own processes, which its controller has started."""
    children = Path(f"/proc/{job.job_id}/task/{job.job_id}/children")
    return [int(word) for word in children.read_text().split()]


def wait_for_state(job, folder, number=1):
    while not (folder / "state.json").exists() or len(starts(folder)) < number:
        assert job.state == "RUNNING", job.stderr()
        time.sleep(0.1)


@pytest.mark.slow
def test_a_run_that_saved_is_queued_again_and_goes_on(tmp_path):
    # submitit takes a signal for a time-out, and counts it, where the limit is short.
    words = ("--cluster", "local", "--ngpus", "2", "--timeout", "5", "--max-timeouts", "1")
    job = submit_jobs(Counter, parse(*words, "--output-dir", tmp_path, "steps=30"), name="dinov2:test")
    wait_for_state(job, tmp_path)
    for process in processes_of(job):
        os.kill(process, signal.SIGUSR2)
    assert job.results() == [30, 30]
    first, second = starts(tmp_path)
    assert (first["from"], first["size"]) == (0, 2)
    assert 0 < second["from"] < 30
    assert len(starts(tmp_path, rank=1)) == 2
    log = job._sub_jobs[0].stdout()
    assert "SIGUSR2 received, saved after step" in log
    assert "(0 remaining timeouts)" in log
    assert "the first process queues the job again" in job._sub_jobs[1].stdout()


class FakeJob:
    """What a task asks of submitit, for one process."""

    USR_SIG = "USR2"
    job_id, num_tasks = "7", 1

    def __init__(self, global_rank):
        self.global_rank = global_rank


@pytest.fixture
def stopped(monkeypatch):
    """Run a trainer's task whose training stops by a signal; return exit status and handler's calls."""
    before = signal.getsignal(signal.SIGUSR2)
    for name in ("DINOV2_JOB", "DINOV2_JOB_RESTARTS"):  # tasks set them for good
        monkeypatch.setenv(name, "0")

    def run(number, rank=0, handler=None):
        def main(args):
            raise Interrupted("stopped", number)

        calls = []
        monkeypatch.setattr("dinov2.train.main", main, raising=False)
        monkeypatch.setattr(submitit, "JobEnvironment", lambda: FakeJob(rank))
        signal.signal(signal.SIGUSR2, (lambda *words: calls.append(words)) if handler is None else handler)
        with pytest.raises(SystemExit) as stop:
            Trainer(argparse.Namespace(output_dir="x"))()
        return stop.value.code, calls

    yield run
    signal.signal(signal.SIGUSR2, before)


def test_a_job_is_not_queued_again_more_often_than_asked(stopped, monkeypatch, tmp_path):
    def handler(number, frame):
        delayed = submitit.helpers.DelayedSubmission(Trainer(argparse.Namespace(output_dir="x")))
        delayed.set_timeout(timeout_min=5, max_num_timeout=0)
        paths = submitit.core.utils.JobPaths(tmp_path, job_id="7")
        submitit.core.job_environment.SignalHandler(FakeJob(0), paths, delayed).checkpoint_and_try_requeue(
            number
        )

    with pytest.raises(submitit.core.utils.UncompletedJobError, match="timed-out too many times"):
        stopped(signal.SIGUSR2, handler=handler)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_a_warning_ahead_of_the_limit_requeues_once(stopped, number):
    assert stopped(number) == (EXIT_START_AGAIN, [(number, None)])
    assert stopped(number, rank=1) == (0, [])


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_cancelled_job_is_not_queued_again(stopped, number, rank):
    assert stopped(number, rank=rank) == (EXIT_START_AGAIN, [])


def test_where_nobody_requeues_the_status_asks_for_it(stopped):
    assert stopped(signal.SIGUSR2, handler=signal.SIG_DFL) == (EXIT_START_AGAIN, [])


@pytest.mark.parametrize(
    ("starts", "restarts", "sum_of_both"), [(0, None, 0), (1, None, 1), (0, "0", 0), (0, "1", 1), (2, "1", 3)]
)
def test_no_resume_holds_for_the_first_start_only(monkeypatch, starts, restarts, sum_of_both):
    seen = []
    for task in (Trainer, linear.Evaluator):
        monkeypatch.setattr(f"{task.module}.main", seen.append, raising=False)
    monkeypatch.setattr(submitit, "JobEnvironment", lambda: FakeJob(0))
    for name, value in (
        ("SLURM_RESTART_COUNT", restarts),
        ("DINOV2_JOB", "none"),
        ("DINOV2_JOB_RESTARTS", "0"),
    ):
        if value is not None:
            monkeypatch.setenv(name, value)
    args = argparse.Namespace(output_dir="x", no_resume=True)
    linear.Evaluator(args, starts=starts)()
    assert seen.pop().no_resume is not bool(sum_of_both)
    # The trainer looks how far the earlier start came: one that ended before it had the output directory must
    # not make the next one continue an older run.
    Trainer(args, starts=starts)()
    assert seen.pop().no_resume is True
    assert job_details(os.environ)["DINOV2_JOB"][1] == sum_of_both
    assert args.no_resume is True
