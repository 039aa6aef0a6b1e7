"""Setting up a run: output folder, config.yaml, learning rate, seeds, and what is left alone."""

import argparse
import logging
import random
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from dinov2 import distributed
from dinov2.configs import resolve_config
from dinov2.errors import ConfigError, OutputError
from dinov2.utils.config import (
    apply_scaling_rules_to_cfg,
    default_setup,
    get_cfg_from_args,
    make_output_dir,
    setup,
    write_config,
)


def arguments(output_dir="", *opts, config_file="", **others):
    return argparse.Namespace(config_file=config_file, opts=list(opts), output_dir=str(output_dir), **others)


@pytest.fixture(autouse=True)
def logs_end_with_the_test():
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    yield
    for handler in set(root.handlers) - set(before):
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)
    logging.captureWarnings(False)


def test_arguments_keep_their_overrides(tmp_path):
    # Defect 9: upstream appends to args.opts, so a requeued job collects output directories.
    args = arguments(tmp_path, "train.seed=3", lenient_config=False)
    for _ in range(2):
        assert get_cfg_from_args(args).train.seed == 3
    assert args.opts == ["train.seed=3"] and args.output_dir == str(tmp_path)


def test_no_overrides_at_all(tmp_path):
    args = argparse.Namespace(config_file=None, opts=None, output_dir=str(tmp_path))
    assert get_cfg_from_args(args).train.output_dir == str(tmp_path)


def test_output_dir_option_then_override_then_current_directory(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    assert get_cfg_from_args(arguments("out")).train.output_dir == str(tmp_path / "out")
    args = arguments("", "train.output_dir=other")
    assert get_cfg_from_args(args).train.output_dir == args.output_dir == str(tmp_path / "other")
    assert get_cfg_from_args(arguments()).train.output_dir == str(tmp_path)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]

    both = arguments("out", "train.output_dir=other")
    assert get_cfg_from_args(both).train.output_dir == str(tmp_path / "out")
    assert 'train.output_dir "other" is not used' in caplog.text


def test_output_dir_of_a_config_file_is_where_an_earlier_run_wrote(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text("train: {output_dir: /earlier/run}\n")
    cfg = get_cfg_from_args(arguments(config_file=str(tmp_path / "c.yaml")))
    assert cfg.train.output_dir == str(tmp_path)
    assert 'train.output_dir "/earlier/run" is not used' in caplog.text


def test_lenient_option(tmp_path):
    args = arguments(tmp_path, "optim.warmup_pochs=13")
    with pytest.raises(ConfigError):
        get_cfg_from_args(args)
    args.lenient_config = True
    assert get_cfg_from_args(args).optim.warmup_epochs == 10


@pytest.mark.parametrize(
    ("rule", "processes", "expected"),
    [
        ("sqrt_wrt_1024", 1, 0.004 * (64 / 1024) ** 0.5),
        ("sqrt_wrt_1024", 4, 0.004 * (256 / 1024) ** 0.5),
        ("sqrt_wrt_768", 4, 0.004 * (256 / 768) ** 0.5),
        ("linear_wrt_256", 2, 0.004 * 128 / 256),
        ("none", 4, 0.5),
    ],
)
def test_scaling_rules(monkeypatch, rule, processes, expected):
    # Defect 6: a fork divided by 768 under the name sqrt_wrt_1024.
    monkeypatch.setattr(distributed, "get_global_size", lambda: processes)
    cfg = resolve_config("", ["optim.lr=0.5", f"optim.scaling_rule={rule}"])
    for _ in range(2):  # deriving twice changes nothing
        assert apply_scaling_rules_to_cfg(cfg) is cfg
        assert cfg.optim.lr == pytest.approx(expected, rel=1e-12)


def test_accumulated_batches_count_like_processes(monkeypatch):
    monkeypatch.setattr(distributed, "get_global_size", lambda: 2)
    cfg = apply_scaling_rules_to_cfg(resolve_config("", ["optim.accumulate_steps=8"]))
    assert cfg.optim.lr == pytest.approx(0.004)  # 2 processes of 8 batches of 64 images


def test_unknown_scaling_rule():
    cfg = OmegaConf.create({"optim": {"scaling_rule": "cube"}})
    with pytest.raises(ConfigError, match='optim.scaling_rule is "cube": "sqrt_wrt_<images>"'):
        apply_scaling_rules_to_cfg(cfg)


def test_config_is_written_once_and_reads_back_the_same(tmp_path, caplog):
    cfg = resolve_config("", ["optim.base_lr=1e-7", "train.dataset_path=A:root=/x: y"])
    path = write_config(cfg, str(tmp_path))
    assert path == str(tmp_path / "config.yaml")
    assert resolve_config(path, []) == cfg
    assert write_config(cfg, str(tmp_path)) == path
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.yaml"]
    assert write_config(cfg, str(tmp_path), "other.yaml") == str(tmp_path / "other.yaml")


def test_a_differing_config_is_kept_under_a_number(tmp_path, caplog):
    # Defect 8.
    for epochs in (11, 12, 13, 11):
        write_config(resolve_config("", [f"optim.epochs={epochs}"]), str(tmp_path))
    epochs = {path.name: OmegaConf.load(path).optim.epochs for path in tmp_path.iterdir()}
    assert epochs == {"config.yaml": 11, "config.1.yaml": 11, "config.2.yaml": 12, "config.3.yaml": 13}
    assert "differed from this run's config and was kept as config.3.yaml" in caplog.text


def test_an_evaluation_leaves_the_training_config_alone(tmp_path):
    # Defect 8.
    training = resolve_config("", [])
    write_config(training, str(tmp_path))
    for _ in range(2):
        path = write_config(resolve_config("", ["train.seed=1"]), str(tmp_path), keep_existing=True)
        assert path == str(tmp_path / "config.1.yaml")
    assert resolve_config(str(tmp_path / "config.yaml"), []) == training
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["config.1.yaml", "config.yaml"]


def test_only_the_main_process_writes_the_config(tmp_path, monkeypatch):
    # Defect 8.
    monkeypatch.setattr(distributed, "is_main_process", lambda: False)
    assert write_config(resolve_config("", []), str(tmp_path)) == str(tmp_path / "config.yaml")
    assert list(tmp_path.iterdir()) == []


def test_config_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written: Not a directory"):
        write_config(resolve_config("", []), str(tmp_path / "file"))


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_output_dir_that_cannot_be_written(tmp_path, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError) as caught:
        make_output_dir(str(tmp_path / place))
    assert str(caught.value).startswith(f'the output directory "{tmp_path / place}" cannot be written (')
    assert str(caught.value).endswith("name another with --output-dir")


def test_folder_without_write_permission(tmp_path):
    tmp_path.chmod(0o500)
    try:
        make_output_dir(str(tmp_path))
        pytest.skip("this user may write everywhere")
    except OutputError as error:
        assert "Permission denied" in str(error)
    finally:
        tmp_path.chmod(0o700)


def test_setup_makes_everything_ready(tmp_path):
    # Defect 4: train.seed used to be read by nobody.
    args = arguments(tmp_path / "new" / "out", "train.seed=7", "train.device=cpu", "train.saveckp_freq=5")
    cfg = setup(args)
    drawn = torch.rand(3), random.random()
    assert cfg.optim.lr == pytest.approx(0.001)
    out = Path(args.output_dir)
    assert OmegaConf.load(out / "config.yaml") == cfg
    log = (out / "logs" / "log.txt").read_text()
    assert "train.saveckp_freq 5 has no effect" in log and "packaged default config" in log

    torch.manual_seed(7)
    random.seed(7)
    assert torch.equal(drawn[0], torch.rand(3)) and drawn[1] == random.random()


def test_each_process_is_seeded_with_its_rank(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "get_global_rank", lambda: 2)
    default_setup(arguments(tmp_path), seed=7, device="cpu")
    drawn = torch.rand(3)
    torch.manual_seed(9)
    assert torch.equal(drawn, torch.rand(3))


def test_setup_for_an_evaluation_in_the_training_folder(tmp_path):
    cfg = setup(arguments(tmp_path, "train.device=cpu"))
    args = arguments(tmp_path, "train.device=cpu", "train.seed=5", config_file=str(tmp_path / "config.yaml"))
    setup(args, keep_existing_config=True)
    assert OmegaConf.load(tmp_path / "config.yaml") == cfg
    assert OmegaConf.load(tmp_path / "config.1.yaml").train.seed == 5


def test_a_wrong_config_leaves_no_folder_behind(tmp_path):
    with pytest.raises(ConfigError):
        setup(arguments(tmp_path / "out", "optim.epochs=0"))
    assert not (tmp_path / "out").exists()
