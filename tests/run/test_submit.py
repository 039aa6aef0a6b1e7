"""Submission, with jobs that really run through submitit on this machine."""

import contextlib
import copy
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time

import pytest
import submitit

from dinov2.errors import ConfigError, OutputError
from dinov2.run.eval import extract, knn, linear, log_regression, slides_extract, slides_train
from dinov2.run.executors import SubmissionError
from dinov2.run.submit import Task, get_args_parser, get_shared_folder, submit_jobs
from dinov2.run.train.train import Trainer
from tests.conftest import REPO
from tests.run.conftest import parse
from tests.run.counting import Counter
from tests.run.jobs import SumOfRanks


def test_defaults_and_aliases_are_those_of_upstream():
    args = get_args_parser().parse_args([])
    assert (args.ngpus, args.nodes, args.timeout, args.partition) == (8, 1, 2800, None)
    assert (args.use_volta32, args.comment, args.exclude) == (False, "", "")
    assert (args.signal_delay, args.max_timeouts) == (120, 30)
    for words in (["--gpus", "2"], ["--gpus-per-node", "2"], ["--ngpus", "2"]):
        assert get_args_parser().parse_args(words).ngpus == 2
    assert get_args_parser().parse_args(["--nnodes", "3"]).nodes == 3


@pytest.mark.slow
def test_a_job_of_two_processes_runs_and_they_find_each_other(tmp_path):
    args = parse("--cluster", "local", "--ngpus", "2", "--output-dir", tmp_path / "%j", "a.b=1")
    before = copy.deepcopy(args)
    job = submit_jobs(SumOfRanks, args, name="dinov2:test")
    assert args == before
    assert [result["total"] for result in job.results()] == [3.0, 3.0]
    notes = [json.loads((tmp_path / job.job_id / f"note_{rank}.json").read_text()) for rank in range(2)]
    assert [note["rank"] for note in notes] == [0, 1]
    assert notes[0]["opts"] == ["a.b=1"]


@pytest.mark.slow
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
        (extract.Extractor, "dinov2.eval.extract"),
        (slides_extract.SlideExtractor, "dinov2.eval.slides.extract"),
        (slides_train.SlideTrainer, "dinov2.eval.slides.train"),
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


def dry_run(capsys, *words, task=SumOfRanks):
    """Return what a dry run prints."""
    assert submit_jobs(task, parse("--dry-run", *words), name="dinov2:test") is None
    return capsys.readouterr().out


def test_a_dry_run_prints_the_job_script_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")  # so there is no Slurm
    monkeypatch.setenv("DINOV2_SLURM_PARTITION", "site")
    words = ["--nodes", "4", "--timeout", "60", "--use-volta32", "--constraint", "ib", "--exclude", "n1,n2"]
    script = dry_run(capsys, *words, "--output-dir", tmp_path / "new").splitlines()
    assert script[0] == "#!/bin/bash"
    for line in (
        "nodes=4",
        "ntasks-per-node=8",
        "gpus-per-node=8",
        "time=60",
        "signal=USR2@120",
        "constraint='ib&volta32gb'",
        "exclude=n1,n2",
        "partition=site",
        "job-name=dinov2:test",
    ):
        assert f"#SBATCH --{line}" in script
    assert not any("comment" in line or "array" in line for line in script)
    assert script[-1] == (
        f"srun --unbuffered --output {tmp_path}/new/%j_%t_log.out --error {tmp_path}/new/%j_%t_log.err "
        f"{sys.executable} -u -m submitit.core._submit {tmp_path}/new"
    )
    assert f"export PYTHONPATH={REPO}${{PYTHONPATH:+:$PYTHONPATH}}" in script
    assert list(tmp_path.iterdir()) == []
    assert "partition=mine" in dry_run(capsys, "--partition", "mine", "--output-dir", tmp_path)
    assert "2 processes of:\n" in dry_run(
        capsys, "--cluster", "local", "--ngpus", "2", "--output-dir", tmp_path / "new"
    )
    assert list(tmp_path.iterdir()) == []


SITE = """
partition: gpu
account: pathology
qos: long
constraint: a100
gres: gpu:a100
cpus_per_task: 6
timeout: 1440
signal_delay: 300
max_timeouts: 5
python: apptainer exec image.sif python
setup: [module load cuda, ulimit -n 65536]
environment: {NCCL_SOCKET_IFNAME: "ib0", WITH_SPACE: a b}
srun_args: [--cpu-bind=none]
executor_parameters: {slurm_mail_user: ada@example.org}
"""


def test_a_site_says_everything_in_one_file(tmp_path, monkeypatch, capsys):
    (tmp_path / "site.yaml").write_text(SITE)
    monkeypatch.setenv("DINOV2_CLUSTER_CONFIG", str(tmp_path / "site.yaml"))
    script = dry_run(capsys, "--output-dir", tmp_path, "--qos", "short").splitlines()
    for line in (
        "#SBATCH --partition=gpu",
        "#SBATCH --account=pathology",
        "#SBATCH --qos=short",
        "#SBATCH --constraint=a100",
        "#SBATCH --gres=gpu:a100:8",
        "#SBATCH --cpus-per-task=6",
        "#SBATCH --time=1440",
        "#SBATCH --signal=USR2@300",
        "#SBATCH --mail-user=ada@example.org",
        "module load cuda",
        "ulimit -n 65536",
        "export NCCL_SOCKET_IFNAME=ib0",
        "export WITH_SPACE='a b'",
    ):
        assert line in script
    assert not any("gpus-per-node" in line for line in script)
    assert "--cpu-bind=none apptainer exec image.sif python -u -m submitit.core._submit" in script[-1]
    assert parse().max_timeouts == 5
    assert not any(
        "gres" in line or "gpus" in line
        for line in dry_run(capsys, "--ngpus", "0", "--output-dir", tmp_path).splitlines()
    )


def test_variables_of_the_site_reach_a_job_on_this_machine(tmp_path, monkeypatch):
    (tmp_path / "site.yaml").write_text("environment: {SITE_VARIABLE: from the site}\n")
    monkeypatch.setenv("DINOV2_CLUSTER_CONFIG", str(tmp_path / "site.yaml"))
    # A submitter inside an allocation of its own, whose variables are not those of the job.
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("RANK", "3")
    words = ("--cluster", "local", "--ngpus", "0", "--output-dir", tmp_path, "steps=1")
    assert submit_jobs(Counter, parse(*words), name="dinov2:test").result() == 1
    start = json.loads((tmp_path / "starts_0.jsonl").read_text())
    assert (start["SITE_VARIABLE"], start["RANK"], start["SLURM_PROCID"]) == ("from the site", None, None)
    assert (os.environ["RANK"], "SITE_VARIABLE" in os.environ) == ("3", False)


@pytest.fixture
def sbatch(tmp_path, monkeypatch):
    """A stand-in for the commands of Slurm, which takes every script."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "sbatch").write_text("#!/bin/sh\necho Submitted batch job 4711\n")
    (folder / "srun").write_text("#!/bin/sh\n")
    for file in folder.iterdir():
        file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def test_what_is_submitted_is_what_the_dry_run_printed(sbatch, tmp_path, capsys):
    words = ("--nodes", "2", "--comment", "hello", "--output-dir", tmp_path / "%j")
    printed = dry_run(capsys, *words)
    job = submit_jobs(SumOfRanks, parse("--cluster", "slurm", *words), name="dinov2:test")
    assert job.job_id == "4711"
    (script,) = (tmp_path / "4711").glob("*submission.sh")
    assert script.read_text().rstrip("\n") == printed.rstrip("\n")
    assert "#SBATCH --comment=hello" in printed
    assert "partition" not in printed


@pytest.mark.parametrize("more", [(), ("--sweep", "a.x=1,2")])
def test_a_refusal_of_slurm_is_one_sentence(more, sbatch, tmp_path):
    (sbatch / "sbatch").write_text(
        "#!/bin/sh\necho sbatch: error: invalid partition specified: gpuu >&2\nexit 1\n"
    )
    words = ("--cluster", "slurm", "--partition", "gpuu", "--output-dir", tmp_path / "out", *more)
    told = "not taken .sbatch: error: invalid partition specified: gpuu.: see .* --partition"
    with pytest.raises(SubmissionError, match=told) as caught:
        submit_jobs(SumOfRanks, parse(*words), name="dinov2:test")
    assert "\n" not in str(caught.value)


def test_a_sweep_is_submitted_as_the_array_of_the_dry_run(sbatch, tmp_path, capsys):
    words = (
        "--sweep",
        "a.x=1,2",
        "--sweep",
        "b.x=u,v,w",
        "--max-parallel",
        "2",
        "--output-dir",
        tmp_path / "out",
    )
    printed = dry_run(capsys, *words, "a.y=0")
    script, _, table = printed.partition("\n\njob ")
    assert "#SBATCH --array=0-5%2" in script
    assert "5    a.x-2_b.x-w  a.x=2 b.x=w" in table
    jobs = submit_jobs(SumOfRanks, parse("--cluster", "slurm", *words, "a.y=0"), name="dinov2:test")
    assert [job.job_id for job in jobs] == [f"4711_{number}" for number in range(6)]
    (written,) = (tmp_path / "out").glob("*submission.sh")
    assert written.read_text().rstrip("\n") == script
    tasks = [job.submission().function for job in jobs]
    assert tasks[5].args.opts == ["a.y=0", "a.x=2", "b.x=w"]
    assert tasks[5].args.output_dir == str(tmp_path / "out" / "a.x-2_b.x-w")
    recorded = json.loads((tmp_path / "out" / "sweep.json").read_text())["jobs"]
    assert recorded[5] == {"folder": "a.x-2_b.x-w", "values": {"a.x": "2", "b.x": "w"}, "job": "4711_5"}


def test_all_jobs_of_a_sweep_are_checked_before_any_is_submitted(tmp_path):
    words = ["--output-dir", tmp_path / "out", "--sweep", "train.seed=0,1", "--sweep", "optim.epochs=100,x"]
    args = parse("--cluster", "debug", *words, "optim.warmup_pochs=3")
    args.lenient_config = False
    with pytest.raises(ConfigError) as error:
        submit_jobs(Trainer, args, name="dinov2:train")
    text = str(error.value)
    assert text.startswith("the sweep cannot be submitted:\n")
    assert "in seed-0_epochs-100, seed-1_epochs-100: optim.warmup_pochs" in text
    assert "in seed-0_epochs-x, seed-1_epochs-x: the configuration has 2 problems" in text
    assert not (tmp_path / "out").exists()


def test_a_sweep_on_this_machine_runs_its_jobs_one_after_the_other(tmp_path):
    words = ["--cluster", "debug", "--ngpus", "0", "--output-dir", tmp_path, "--sweep", "a.x=1,2"]
    jobs = submit_jobs(SumOfRanks, parse(*words), name="dinov2:test")
    assert [job.result()["opts"] for job in jobs] == [["a.x=1"], ["a.x=2"]]
    assert (tmp_path / "x-1" / "note_0.json").exists()
    assert len(json.loads((tmp_path / "sweep.json").read_text())["jobs"]) == 2


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
    for words, expected in (
        (["--signal-delay", "600", "--timeout", "10"], "--signal-delay is 600 seconds.*less than 600"),
        (["--nodes", "0"], "--nodes is 0, but must be at least 1"),
        (["--max-parallel", "2"], "--max-parallel is for the jobs of a --sweep"),
        (["--sweep", "a.x=1,2", "--output-dir", "out_%j"], "use --output-dir without %j"),
    ):
        with pytest.raises(ConfigError, match=expected):
            submit_jobs(SumOfRanks, parse("--output-dir", tmp_path / "x", *words), name="x")
    assert list(tmp_path.iterdir()) == []
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


def test_slurm_is_asked_for_where_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match="there is no srun here"):
        submit_jobs(SumOfRanks, parse("--cluster", "slurm", "--output-dir", tmp_path / "x"), name="x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("slurm_mial_user: x", "slurm_mial_user|mial_user"),
        ("mail_user: x", "submitit knows no parameter mail_user"),
    ],
)
def test_a_parameter_that_submitit_does_not_know_is_named(tmp_path, monkeypatch, line, expected):
    (tmp_path / "site.yaml").write_text(f"executor_parameters: {{{line}}}\n")
    monkeypatch.setenv("DINOV2_CLUSTER_CONFIG", str(tmp_path / "site.yaml"))
    with pytest.raises(ConfigError, match=expected):
        submit_jobs(SumOfRanks, parse("--dry-run", "--output-dir", tmp_path), name="x")


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


EVALUATIONS = ("knn", "linear", "log_regression", "extract", "slides_extract")
SCRIPTS = ["train/train.py", *(f"eval/{name}.py" for name in EVALUATIONS)]
NEEDED = {
    "eval/extract.py": ["--dataset", "ImageFolder:root=x"],
    "eval/slides_extract.py": ["--slides", "x"],
}


def mistaken_words(tmp_path):
    return ["--dry-run", "--config-file", str(tmp_path / "none.yaml"), "--output-dir", str(tmp_path)]


@pytest.mark.parametrize("script", SCRIPTS)
def test_entry_scripts_report_mistakes_in_one_sentence(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, *mistaken_words(tmp_path), *NEEDED.get(script, [])])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(REPO / "dinov2" / "run" / script), run_name="__main__")
    assert stop.value.code == 1
    assert capsys.readouterr().err.strip() == (
        f"error: the config file {tmp_path / 'none.yaml'} does not exist: check --config-file"
    )


def test_training_on_slides_is_submitted_as_one_process(tmp_path, monkeypatch, capsys):
    script = str(REPO / "dinov2" / "run" / "eval" / "slides_train.py")
    words = ["--bags", "b", "--labels", "l", "--target", "t", "--output-dir", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [script, *words, "--dry-run"])
    with pytest.raises(SystemExit):
        runpy.run_path(script, run_name="__main__")
    assert "takes one process, and the job has 1 x 8: give --nodes 1" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [script, *words, "--dry-run", "--ngpus", "1", "--cluster", "slurm"])
    with contextlib.suppress(SystemExit):
        runpy.run_path(script, run_name="__main__")
    assert "#SBATCH --job-name=dinov2:slides_train" in capsys.readouterr().out


def test_an_entry_script_starts_as_a_file_and_takes_the_package_beside_it(tmp_path):
    """Without PYTHONPATH, from another folder, with a copy of the package that nothing else points to."""
    shutil.copytree(
        REPO / "dinov2", tmp_path / "checkout" / "dinov2", ignore=shutil.ignore_patterns("__pycache__")
    )
    script = tmp_path / "checkout" / "dinov2" / "run" / "train" / "train.py"
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*words):
        return subprocess.run(
            [sys.executable, script, *words],
            cwd=tmp_path,
            env=environ,
            capture_output=True,
            text=True,
            timeout=120,
        )

    wrong = run(*mistaken_words(tmp_path))
    assert (wrong.returncode, wrong.stderr.count("\n")) == (1, 1)
    assert wrong.stderr.startswith("error: the config file")
    right = run("--dry-run", "--output-dir", "out", "train.dataset_path=ImageFolder:root=/x")
    assert right.returncode == 0, right.stderr
    assert f"export PYTHONPATH={tmp_path / 'checkout'}$" in right.stdout
