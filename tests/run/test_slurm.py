"""Jobs on a real Slurm of one node, which this file starts and stops (tests/run/slurm.py)."""

import json
import re
import subprocess
import sys

import pytest
import torch

from dinov2.run.submit import submit_jobs
from tests.conftest import REPO
from tests.run.conftest import parse
from tests.run.counting import Counter
from tests.run.slurm import Slurm, reason_to_skip
from tests.train import conftest as training

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(reason_to_skip()), reason=f"no Slurm here: {reason_to_skip()}"),
]

# Whatever the machine does besides: a job starts, imports torch and finishes.
LIMIT = 300
TRAINING = ("train.device=cpu", "train.OFFICIAL_EPOCH_LENGTH=15", "evaluation.eval_period_iterations=30")
ITERATIONS = 30  # two epochs

tile_folder = training.tile_folder


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    cluster = Slurm(tmp_path_factory.mktemp("slurm"))
    yield cluster
    cluster.stop()


@pytest.fixture
def here(slurm, monkeypatch):
    """Let submissions of this process go to the Slurm of these tests."""
    for name, value in slurm.environ.items():
        monkeypatch.setenv(name, value)
    return slurm


@pytest.fixture(scope="module", autouse=True)
def limited(slurm, tmp_path_factory):
    """A job that runs into its time limit while the other tests run: its folder and the job.

    It asks for its signal 100 to 40 seconds after its start, as Slurm may give it a minute too early.
    """
    folder = tmp_path_factory.mktemp("limited")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in slurm.environ.items():
            patch.setenv(name, value)
        return folder, counting(folder, "--ngpus", "0", "--timeout", "2", "--signal-delay", "20")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    file = tmp_path_factory.mktemp("config") / "tiny.yaml"
    file.write_text(training.TINY)
    return file


@pytest.fixture(scope="module")
def undisturbed(slurm, config, tile_folder, tmp_path_factory):
    """A training without interruption: two processes of torchrun inside an allocation."""
    folder = tmp_path_factory.mktemp("undisturbed")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    slurm.call(
        *(
            "srun",
            "-n1",
            "--gpus-per-node=2",
            "--cpus-per-task=4",
            "env",
            f"PYTHONPATH={REPO}",
            "OMP_NUM_THREADS=1",
        ),
        *(*torchrun, REPO / "dinov2" / "train" / "train.py"),
        *(
            "--config-file",
            config,
            "--output-dir",
            folder,
            f"train.dataset_path=ImageFolder:root={tile_folder}",
        ),
        *TRAINING,
        timeout=LIMIT,
    )
    return folder


def run_script(slurm, script, *words):
    """Run an entry script as a user does, without PYTHONPATH and in another folder; return what it said."""
    environ = {name: value for name, value in slurm.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, str(REPO / "dinov2" / "run" / script), *map(str, words)],
        env=environ | {"OMP_NUM_THREADS": "1"},
        cwd=slurm.folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def submitted(output):
    return re.search(r"submitted job (\d+)", output).group(1)


def rows(folder):
    path = folder / "training_metrics.json"
    timed = {"iter_time", "data_time", "images_per_second"}
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [{key: value for key, value in line.items() if key not in timed} for line in lines]


def export(folder):
    return torch.load(folder / f"eval/training_{ITERATIONS - 1}/teacher_checkpoint.pth", weights_only=True)


def logs(folder, job):
    return "\n".join(path.read_text() for path in sorted(folder.glob(f"{job}_*_log.*")))


def starts(folder, rank=0):
    path = folder / f"starts_{rank}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def counting(folder, *words):
    """Submit a job of two processes that counts until something stops it."""
    request = ("--cluster", "slurm", "--ngpus", "2", "--timeout", "10", "--output-dir", folder, *words)
    return submit_jobs(Counter, parse(*request, "steps=100000", "restarted=5"), name="dinov2:test")


def test_torchrun_inside_an_allocation_is_what_counts(undisturbed):
    """Slurm says that there is one task, torchrun that there are two processes."""
    assert len(rows(undisturbed)) == ITERATIONS
    assert "process 0 of 2" in (undisturbed / "logs" / "log.txt").read_text()
    assert (undisturbed / "logs" / "log.txt.rank1").exists()


@pytest.fixture(scope="module")
def requeued(slurm, config, tile_folder, undisturbed, tmp_path_factory):
    """A training that is told to stop in its middle; its folder and what Slurm says of the job."""
    folder = tmp_path_factory.mktemp("requeued")
    output = run_script(
        *(slurm, "train/train.py", "--nodes", "1", "--ngpus", "2", "--partition", "debug", "--timeout", "10"),
        *(
            "--config-file",
            config,
            "--output-dir",
            folder,
            f"train.dataset_path=ImageFolder:root={tile_folder}",
        ),
        *(*TRAINING, "checkpointing.period=1000"),
    )
    job = submitted(output)
    slurm.wait(lambda: len(rows(folder)) >= 3, "three iterations", LIMIT)
    slurm.call("scancel", "--signal=USR2", job)
    return folder, job, slurm.wait_for_end(job, LIMIT)


def test_a_training_is_requeued_and_ends_as_if_nothing_had_happened(requeued, undisturbed):
    folder, job, state = requeued
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "1"), logs(folder, job)
    assert "remaining timeouts)" in logs(folder, job)
    assert rows(folder) == rows(undisturbed)
    for name, tensor in export(undisturbed)["teacher"].items():
        assert torch.equal(tensor, export(folder)["teacher"][name]), name


def test_an_evaluation_reads_the_teacher_of_the_requeued_training(
    slurm, requeued, config, tile_folder, tmp_path
):
    folder, _, _ = requeued
    for split in ("train", "val"):
        for number, name in enumerate(("left", "right")):
            (tmp_path / split / name).mkdir(parents=True)
            for tile in sorted((tile_folder / "nest").iterdir())[number::2]:
                (tmp_path / split / name / tile.name).write_bytes(tile.read_bytes())
    output = run_script(
        *(slurm, "eval/knn.py", "--ngpus", "2", "--timeout", "10", "--config-file", config),
        *("--pretrained-weights", folder / f"eval/training_{ITERATIONS - 1}/teacher_checkpoint.pth"),
        *("--output-dir", tmp_path / "knn", "--nb_knn", "1", "--batch-size", "8", "--num-workers", "0"),
        *("--train-dataset", f"ImageFolder:root={tmp_path / 'train'}"),
        *("--val-dataset", f"ImageFolder:root={tmp_path / 'val'}"),
        *("--opts", "train.device=cpu", "crops.global_crops_size=32"),
    )
    job = submitted(output)
    state = slurm.wait_for_end(job, LIMIT)
    assert state["JobState"] == "COMPLETED", logs(tmp_path / "knn", job)
    results = (tmp_path / "knn" / "results_eval_knn.json").read_text()
    assert "100.0" in results  # every image is its own nearest neighbour


def test_a_sweep_is_an_array_of_trainings(slurm, config, tile_folder, tmp_path):
    output = run_script(
        *(slurm, "train/train.py", "--ngpus", "0", "--timeout", "10", "--config-file", config),
        *("--output-dir", tmp_path, "--sweep", "train.seed=0,1", "--max-parallel", "2"),
        *(f"train.dataset_path=ImageFolder:root={tile_folder}", "train.device=cpu", "optim.max_iterations=4"),
    )
    array = re.search(r"submitted 2 jobs as (\d+)_0 to \1_1", output).group(1)
    table = json.loads((tmp_path / "sweep.json").read_text())["jobs"]
    assert [row["job"] for row in table] == [f"{array}_0", f"{array}_1"]
    for row in table:
        state = slurm.wait_for_end(row["job"], LIMIT)
        assert state["JobState"] == "COMPLETED", logs(tmp_path, array)
        assert len(rows(tmp_path / row["folder"])) == 4
    zero, one = (rows(tmp_path / f"seed-{seed}") for seed in (0, 1))
    assert zero != one


def test_the_time_limit_itself_requeues(slurm, limited, tmp_path):
    folder, job = limited
    state = slurm.wait_for_end(job.job_id, LIMIT)
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "1"), logs(folder, job.job_id)
    assert "SIGUSR2 received, saved after step" in logs(folder, job.job_id)
    first, second = starts(folder)
    assert (first["from"], second["from"] > 0) == (0, True)
    assert job.result() == second["from"] + 5


def test_a_job_that_used_up_its_timeouts_ends(here, tmp_path):
    job = counting(tmp_path, "--max-timeouts", "0")
    here.wait(lambda: (tmp_path / "state.json").exists(), "the first step", LIMIT)
    here.call("scancel", "--signal=USR2", job.job_id)
    state = here.wait_for_end(job.job_id, LIMIT)
    assert (state["JobState"], state["Restarts"]) == ("FAILED", "0")
    assert "timed-out too many times" in logs(tmp_path, job.job_id)


def test_a_cancelled_job_saves_and_is_not_requeued(here, tmp_path):
    job = counting(tmp_path)
    here.wait(lambda: (tmp_path / "state.json").exists(), "the first step", LIMIT)
    here.call("scancel", job.job_id)
    state = here.wait_for_end(job.job_id, LIMIT)
    assert (state["JobState"], state["Restarts"]) == ("CANCELLED", "0")
    assert "SIGTERM received, saved after step" in logs(tmp_path, job.job_id)
    assert len(starts(tmp_path)) == 1


BATCH = """#!/bin/bash
#SBATCH --ntasks=2 --cpus-per-task=1 --time=10 --requeue --open-mode=append
#SBATCH --signal=USR1@120 --output={folder}/log.txt
export PYTHONPATH={repo} OMP_NUM_THREADS=1
srun {python} -m tests.run.counting {folder} steps=30
status=$?
[ $status -eq 75 ] && scontrol requeue "$SLURM_JOB_ID"
exit $status
"""

BATCH_TORCHRUN = """#!/bin/bash
#SBATCH --ntasks=1 --cpus-per-task=2 --time=10 --requeue --open-mode=append
#SBATCH --signal=B:USR1@120 --output={folder}/log.txt
export PYTHONPATH={repo} OMP_NUM_THREADS=1
stop() {{ warned=1; scancel --signal=USR1 "$SLURM_JOB_ID.0"; }}
trap stop USR1
# torchrun itself must not die of the signal; the processes that it starts have handlers of their own.
srun bash -c 'trap "" USR1; exec {python} -m torch.distributed.run \\
    --nnodes "$SLURM_NNODES" --nproc-per-node 2 --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d \\
    --rdzv-endpoint "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):29500" \\
    -m tests.run.counting {folder} steps=30' &
wait $!
status=$?
# The signal ends a wait; the step goes on until it has saved.
while kill -0 $! 2>/dev/null; do wait $!; status=$?; done
[ -n "$warned" ] && scontrol requeue "$SLURM_JOB_ID"
exit $status
"""


@pytest.mark.parametrize(("script", "step"), [(BATCH, ""), (BATCH_TORCHRUN, "--batch")])
def test_a_plain_batch_script_requeues(slurm, tmp_path, script, step):
    """The scripts of docs/launching.md: srun alone, and torchrun with a rendezvous."""
    file = tmp_path / "job.sh"
    file.write_text(script.format(folder=tmp_path, repo=REPO, python=sys.executable))
    job = re.search(r"\d+", slurm.call("sbatch", file)).group()
    slurm.wait(lambda: (tmp_path / "state.json").exists(), "the first step", LIMIT)
    slurm.call(*filter(None, ["scancel", step, "--signal=USR1", job]))
    state = slurm.wait_for_end(job, LIMIT)
    log = (tmp_path / "log.txt").read_text()
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "1"), log
    assert [start["size"] for start in starts(tmp_path)] == [2, 2]
    assert starts(tmp_path)[1]["from"] > 0
    assert json.loads((tmp_path / "state.json").read_text()) == {"done": 30}
