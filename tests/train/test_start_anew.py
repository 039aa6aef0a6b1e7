"""--no-resume: the earlier run is moved aside, once per job, and is never taken for this one."""

import json
from dataclasses import replace

import pytest

from dinov2.errors import ConfigError, OutputError
from dinov2.fsdp import FSDPCheckpointer
from dinov2.train import loop, train
from dinov2.train.start_anew import set_aside, start_anew
from dinov2.train.step import NonFiniteLossError

SHORT = ("train.self_check=off", "checkpointing.period=2", "evaluation.eval_period_iterations=0")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def old_run(tiny, tmp_path):
    folder = tmp_path / "run"
    (folder / "model_0000003").mkdir(parents=True)
    (folder / ".model_0000004.tmp").mkdir()
    (folder / "model_final.rank_0.pth").write_text("old")
    (folder / "last_checkpoint.rank_0").write_text("model_0000003")
    (folder / "training_metrics.json").write_text('{"iteration": 0}\n')
    (folder / "config.yaml").write_text("a: b")
    (folder / "eval").mkdir()
    return folder


@pytest.fixture
def config(tiny, old_run, monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    return lambda *overrides: tiny.resolve(f"train.output_dir={old_run}", *overrides)


def test_what_is_there_moves_to_a_new_folder_each_time(config, old_run):
    assert start_anew(config()) is False
    moved = [
        *("config.yaml", "last_checkpoint.rank_0", "model_0000003", "model_final.rank_0.pth"),
        "training_metrics.json",
    ]
    assert names(old_run / "before_1") == moved
    assert names(old_run) == [".started_anew", "before_1", "eval"]
    assert start_anew(config()) is False
    assert names(old_run) == [".started_anew", "before_1", "eval"]
    (old_run / "model_0000001").mkdir()
    set_aside(config())
    assert names(old_run / "before_2") == ["model_0000001"]


@pytest.mark.parametrize(
    ("job", "count", "name"),
    [
        ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "77"),
        ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "77"),
        ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "none"),
        ("DINOV2_JOB", "DINOV2_JOB_RESTARTS", "77"),
    ],
)
def test_a_later_start_of_the_same_job_resumes(config, old_run, monkeypatch, job, count, name):
    monkeypatch.setenv(job, name)
    monkeypatch.setenv(count, "1")
    # A restart whose first start did not come so far must not continue the run of before.
    assert start_anew(config()) is False
    (old_run / "model_0000001").mkdir()
    monkeypatch.setenv(count, "2")
    assert start_anew(config()) is True
    assert (old_run / "model_0000001").is_dir()
    marker = json.loads((old_run / ".started_anew").read_text())
    (old_run / ".started_anew").write_text(json.dumps({**marker, "launchers": ["elsewhere:1"]}))
    monkeypatch.setenv(job, "78")
    assert start_anew(config()) is False
    assert names(old_run / "before_2") == ["model_0000001"]


def test_what_the_config_names_is_not_moved(config, old_run):
    with pytest.raises(ConfigError, match="MODEL.WEIGHTS names .*choose another --output-dir"):
        start_anew(config(f"MODEL.WEIGHTS={old_run}/model_0000003"))
    assert "model_0000003" in names(old_run)


def test_going_back_never_loads_the_run_of_before(tiny, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    tiny.start(folder, *SHORT, "optim.max_iterations=3")
    real = loop.train_step
    monkeypatch.setattr(
        loop, "train_step", lambda *given, **named: replace(real(*given, **named), problem="it is bad")
    )
    with pytest.raises(NonFiniteLossError, match="there is no checkpoint to go back to"):
        tiny.start(folder, *SHORT, "train.max_bad_steps=1", "train.seed=7", options=("--no-resume",))
    assert "model_final" in names(folder / "before_1")


def test_a_restarted_command_goes_on_from_its_own_first_start(tiny, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    for count in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        tiny.start(folder, *SHORT, "optim.max_iterations=3", options=("--no-resume",))
    assert "model_final" in names(folder) and "before_1" not in names(folder)


def test_an_export_moves_nothing(tiny, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    FSDPCheckpointer(train.SSLMetaArch(tiny.resolve()), str(folder)).save("model_final", iteration=1)
    weights = f"MODEL.WEIGHTS={folder}/model_final"
    tiny.start(folder, weights, options=("--no-resume", "--eval-only"))
    assert "model_final" in names(folder) and "before_1" not in names(folder)


def test_a_run_whose_folder_was_taken_over_does_not_go_back(tiny, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    real, failing = loop.train_step, []

    def step(*given, **named):
        result = real(*given, **named)
        failing.append(len(failing) >= 3)
        if not failing[-1]:
            return result
        (folder / ".running").unlink()  # as somebody does who thinks that the run is dead
        return replace(result, problem="it is bad")

    monkeypatch.setattr(loop, "train_step", step)
    with pytest.raises(OutputError, match="the lock .* was deleted"):
        tiny.start(folder, *SHORT, "optim.max_iterations=6", "train.max_bad_steps=1")
    rows = (folder / "training_metrics.json").read_text().splitlines()
    assert len(rows) >= 3, "rows of the run that has the folder now must stay"
