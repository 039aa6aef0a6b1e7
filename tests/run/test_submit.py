"""Submission, with jobs that really run through submitit on this machine."""

import argparse
import copy
import json
import os
import runpy
import signal
import subprocess
import sys
import time

import pytest
import submitit

from dinov2.errors import ConfigError, OutputError
from dinov2.run.eval import knn, linear, log_regression
from dinov2.run.submit import Task, get_args_parser, get_shared_folder, submit_jobs
from dinov2.run.train.train import Trainer
from tests.conftest import REPO
from tests.run.jobs import SumOfRanks


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("DINOV2_", "SLURM_")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(REPO)
    # The jobs import this package and the tests.
    monkeypatch.setenv("PYTHONPATH", str(REPO))


def parse(*words):
    task_parser = argparse.ArgumentParser(add_help=False)
    task_parser.add_argument("--config-file", default="")
    task_parser.add_argument("--output-dir", default="")
    task_parser.add_argument("opts", nargs=argparse.REMAINDER)
    return get_args_parser(parents=[task_parser]).parse_args([str(word) for word in words])


def test_defaults_and_aliases_are_those_of_upstream():
    args = get_args_parser().parse_args([])
    assert (args.ngpus, args.nodes, args.timeout, args.partition) == (8, 1, 2800, None)
    assert (args.use_volta32, args.comment, args.exclude) == (False, "", "")
    for words in (["--gpus", "2"], ["--gpus-per-node", "2"], ["--ngpus", "2"]):
        assert get_args_parser().parse_args(words).ngpus == 2
    assert get_args_parser().parse_args(["--nnodes", "3"]).nodes == 3


def test_a_job_of_two_processes_runs_and_they_find_each_other(tmp_path):
    args = parse("--cluster", "local", "--ngpus", "2", "--output-dir", tmp_path / "%j", "a.b=1")
    before = copy.deepcopy(args)
    job = submit_jobs(SumOfRanks, args, name="dinov2:test")
    assert args == before
    assert [result["total"] for result in job.results()] == [3.0, 3.0]
    notes = [json.loads((tmp_path / job.job_id / f"note_{rank}.json").read_text()) for rank in range(2)]
    assert [note["rank"] for note in notes] == [0, 1]
    assert notes[0]["opts"] == ["a.b=1"]


def test_an_interrupted_job_is_queued_again_and_finishes(tmp_path):
    job = submit_jobs(
        SumOfRanks,
        parse("--cluster", "local", "--ngpus", "0", "--output-dir", tmp_path, "wait"),
        name="dinov2:test",
    )
    marker = tmp_path / "interrupt_me"
    while not (marker.exists() and marker.read_text()):
        assert job.state == "RUNNING", job.stderr()
        time.sleep(0.1)
    os.kill(int(marker.read_text()), signal.SIGUSR2)  # what Slurm sends before it stops a job
    assert job.result() == {"rank": 0, "total": 1.0, "opts": ["wait"], "directory": str(REPO)}
    assert "queueing it again" in job.stderr() + job.stdout()


def test_checkpoint_hands_over_the_same_arguments(tmp_path):
    args = parse("--output-dir", tmp_path / "%j", "a=1")
    before = copy.deepcopy(args)
    delayed = Trainer(args).checkpoint()
    assert isinstance(delayed, submitit.helpers.DelayedSubmission)
    assert isinstance(delayed.function, Trainer)
    assert delayed.function.args == before


@pytest.mark.parametrize(
    ("task", "module"),
    [
        (Trainer, "dinov2.train"),
        (knn.Evaluator, "dinov2.eval.knn"),
        (linear.Evaluator, "dinov2.eval.linear"),
        (log_regression.Evaluator, "dinov2.eval.log_regression"),
    ],
)
def test_a_task_calls_the_main_of_its_module_with_its_own_copy(task, module, monkeypatch, tmp_path):
    called = []
    monkeypatch.setattr(f"{module}.main", lambda args: called.append(args) or "done")
    args = parse("--cluster", "debug", "--ngpus", "0", "--output-dir", tmp_path / "run_%j", "train.seed=3")
    args.lenient_config = False
    job = submit_jobs(task, args, name="dinov2:test")
    assert job.result() == "done"
    assert called[0].output_dir == str(tmp_path / f"run_{job.job_id}")
    assert called[0].opts == ["train.seed=3"]
    assert called[0] is not args


def test_the_request_reaches_slurm(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", logger="dinov2")
    monkeypatch.setenv("DINOV2_SLURM_PARTITION", "site")
    words = ["--dry-run", "--nodes", "4", "--timeout", "60", "--use-volta32", "--exclude", "n1,n2"]
    assert (
        submit_jobs(SumOfRanks, parse(*words, "--output-dir", tmp_path / "new"), name="dinov2:test") is None
    )
    request = caplog.messages[-1]
    for part in (
        "'nodes': 4",
        "'tasks_per_node': 8",
        "'timeout_min': 60",
        "'slurm_signal_delay_s': 120",
        "'slurm_constraint': 'volta32gb'",
        "'slurm_exclude': 'n1,n2'",
        "'slurm_partition': 'site'",
        "'name': 'dinov2:test'",
    ):
        assert part in request
    assert "slurm_comment" not in request
    assert not (tmp_path / "new").exists()
    submit_jobs(
        SumOfRanks, parse(*words, "--partition", "mine", "--output-dir", tmp_path), name="dinov2:test"
    )
    assert "'slurm_partition': 'mine'" in caplog.messages[-1]


def test_submitit_accepts_the_request_for_slurm(tmp_path, monkeypatch):
    """Write the batch script as for Slurm, with a stand-in for its `sbatch`."""
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text("#!/bin/sh\necho Submitted batch job 4711\n")
    (sbatch.parent / "srun").write_text("#!/bin/sh\n")
    for file in sbatch.parent.iterdir():
        file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:{os.environ['PATH']}")
    args = parse("--cluster", "slurm", "--nodes", "2", "--comment", "hello", "--output-dir", tmp_path / "%j")
    job = submit_jobs(SumOfRanks, args, name="dinov2:test")
    assert job.job_id == "4711"
    (script,) = tmp_path.rglob("*submission.sh")
    text = script.read_text()
    for line in ("--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--job-name=dinov2:test"):
        assert f"#SBATCH {line}" in text
    assert "#SBATCH --signal=USR2@120" in text
    assert "--comment=hello" in text.replace('"', "")
    assert "partition" not in text


def test_without_an_output_folder_the_shared_one_is_used(monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match="use --output-dir, or set DINOV2_CHECKPOINT_PATH"):
        submit_jobs(SumOfRanks, parse("--cluster", "debug"), name="dinov2:test")
    monkeypatch.setenv("DINOV2_CHECKPOINT_PATH", str(tmp_path))
    monkeypatch.setenv("LOGNAME", "ada")
    assert get_shared_folder() == tmp_path / "ada" / "experiments"
    job = submit_jobs(SumOfRanks, parse("--cluster", "debug", "--ngpus", "0"), name="dinov2:test")
    assert job.result()["total"] == 1.0
    assert (tmp_path / "ada" / "experiments" / job.job_id / "note_0.json").is_file()


def test_mistakes_are_found_before_anything_is_queued(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml does not exist"):
        submit_jobs(SumOfRanks, parse("--config-file", "none.yaml", "--output-dir", tmp_path), name="x")
    with pytest.raises(ConfigError, match="--nodes is 2, but this machine is only one"):
        submit_jobs(
            SumOfRanks, parse("--cluster", "local", "--nodes", "2", "--output-dir", tmp_path), name="x"
        )
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be made"):
        submit_jobs(
            SumOfRanks, parse("--cluster", "debug", "--output-dir", tmp_path / "file" / "x"), name="x"
        )


def test_the_trainers_config_is_checked_before_anything_is_queued(tmp_path):
    args = parse("--cluster", "debug", "--output-dir", tmp_path, "optim.warmup_pochs=3")
    args.lenient_config = False
    with pytest.raises(ConfigError, match="warmup_pochs"):
        submit_jobs(Trainer, args, name="dinov2:train")


def test_a_relative_config_file_does_not_depend_on_the_directory_of_the_job(tmp_path, monkeypatch):
    (tmp_path / "c.yaml").write_text("")
    monkeypatch.chdir(tmp_path)
    seen = []

    class Look(Task):
        module = "tests.run.jobs"

        def check(self):
            seen.append((self.args.config_file, self.args.output_dir))

    submit_jobs(Look, parse("--dry-run", "--config-file", "c.yaml", "--output-dir", "out"), name="x")
    assert seen == [(str(tmp_path / "c.yaml"), str(tmp_path / "out"))]


SCRIPTS = ["train/train.py", "eval/knn.py", "eval/linear.py", "eval/log_regression.py"]


def mistaken_words(tmp_path):
    return ["--dry-run", "--config-file", str(tmp_path / "none.yaml"), "--output-dir", str(tmp_path)]


@pytest.mark.parametrize("script", SCRIPTS)
def test_entry_scripts_report_mistakes_in_one_sentence(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, *mistaken_words(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(REPO / "dinov2" / "run" / script), run_name="__main__")
    assert stop.value.code == 1
    assert capsys.readouterr().err.strip() == (
        f"error: the config file {tmp_path / 'none.yaml'} does not exist: check --config-file"
    )


def test_an_entry_script_starts_from_the_command_line(tmp_path):
    words = [sys.executable, "dinov2/run/train/train.py", *mistaken_words(tmp_path)]
    result = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert result.stderr.startswith("error: the config file")
