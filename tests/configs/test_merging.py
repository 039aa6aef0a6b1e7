"""Merging and checking: order of precedence, all problems at once, hints, warnings, speed."""

import logging
import subprocess
import sys

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dinov2.configs import (
    dinov2_default_config,
    load_and_merge_config,
    load_config,
    resolve,
    resolve_config,
)
from dinov2.configs.merging import suggest_key
from dinov2.configs.schema import KEYS
from dinov2.errors import ConfigError
from tests.conftest import REPO

SLIPS = """
student:
  num_register_tokens: 0y
  patch_size: 14
train:
  base_lr: 1.0e-3
  centering: sinkhorn
optim:
  warmup_pochs: 13
sshid: 13
crops: none
"""


@pytest.fixture
def slips(tmp_path):
    path = tmp_path / "slips.yaml"
    path.write_text(SLIPS)
    return str(path)


def write(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    return str(tmp_path / "c.yaml")


def test_overrides_win_over_the_file_and_the_file_over_defaults(tmp_path):
    config = write(tmp_path, "optim: {epochs: 50, base_lr: 1e-3}\n")
    overrides = ["optim.base_lr=2e-3", "optim.base_lr=3e-3"]
    cfg = resolve_config(config, overrides, output_dir="/some where/[1]: #2")
    assert (cfg.optim.epochs, cfg.optim.base_lr, cfg.optim.warmup_epochs) == (50, 3e-3, 10)
    assert cfg.train.output_dir == "/some where/[1]: #2"
    assert overrides == ["optim.base_lr=2e-3", "optim.base_lr=3e-3"]


def test_the_result_has_every_key_and_takes_no_other(tmp_path):
    cfg = resolve_config("", [])
    assert cfg == dinov2_default_config
    assert all(OmegaConf.select(cfg, path, default="absent") != "absent" for path in KEYS)
    cfg.optim.lr = 0.1
    with pytest.raises(OmegaConfBaseException):
        cfg.optim.warmup_pochs = 3
    assert dinov2_default_config.optim.lr == 0


def test_all_slips_are_reported_at_once(slips):
    # Defects 1, 2, 3 and 54 in one file.
    with pytest.raises(ConfigError) as caught:
        resolve_config(slips, ["optim.epochs=0", "--output-dir", "out", "student.depht=2"])
    header, *lines = str(caught.value).splitlines()
    assert header == f"the configuration has {len(lines)} problems:"
    expected = [
        'train.base_lr (slips.yaml line 6) is not a config key (did you mean "optim.base_lr"?)',
        'optim.warmup_pochs (slips.yaml line 9) is not a config key (did you mean "optim.warmup_epochs"?)',
        'sshid (slips.yaml line 10) is not a config key (did you mean "train.sshid"?)',
        'student.depht (command line) is not a config key (did you mean "student.depth"?)',
        'the option "--output-dir" stands among the overrides: put options before the first key=value',
        "crops (slips.yaml line 11) is the string 'none', a section of keys is wanted",
        "train.centering (slips.yaml line 7) is the string 'sinkhorn', "
        'one of "centering", "sinkhorn_knopp" is wanted (did you mean "sinkhorn_knopp"?)',
        "student.num_register_tokens (slips.yaml line 3) is the string '0y', "
        "an integer of at least 0 is wanted",
        "optim.epochs (command line) is the number 0, an integer of at least 1 is wanted",
        "crops.local_crops_size is 96, which student.patch_size 14 does not divide: 98 fits",
    ]
    assert lines == [f"  {number}. {text}" for number, text in enumerate(expected, start=1)]


def test_a_single_problem_is_a_single_sentence():
    with pytest.raises(ConfigError) as caught:
        resolve_config("", ["optim.warmup_pochs=13"])
    assert str(caught.value) == (
        'optim.warmup_pochs (command line) is not a config key (did you mean "optim.warmup_epochs"?)'
    )


@pytest.mark.parametrize(
    ("unknown", "hint"),
    [
        ("optim.warmup_pochs", "optim.warmup_epochs"),
        ("optim.warmup", "optim.warmup_epochs"),
        ("optim.sshid", "train.sshid"),
        ("train.batch_size", "train.batch_size_per_gpu"),
        ("optim.batch_size_per_gpu", "train.batch_size_per_gpu"),
        ("train.official_epoch_length", "train.OFFICIAL_EPOCH_LENGTH"),
        ("OFFICIAL_EPOCH_LENGTH", "train.OFFICIAL_EPOCH_LENGTH"),
        ("dino.separate_head", "ibot.separate_head"),
        ("ibot.head_n_prototype", "ibot.head_n_prototypes"),
        ("checkpoint.period", "checkpointing.period"),
        ("optimizer.epoch", "optim.epochs"),
        ("train.learning_rate", None),
        ("wandb.project", "tracking.wandb_project"),
        ("quota.limit", None),
        (
            "compute_precision.student.backbone.param_dtype",
            "compute_precision.student.backbone.mixed_precision.param_dtype",
        ),
        (
            "compute_precision.teacher.ibot_head.mixed_precision.param_type",
            "compute_precision.teacher.ibot_head.mixed_precision.param_dtype",
        ),
    ],
)
def test_hints_look_in_other_sections_too(unknown, hint):
    assert suggest_key(unknown) == (f' (did you mean "{hint}"?)' if hint else "")


def test_lenient_drops_unknown_keys_with_one_warning_each(tmp_path, caplog):
    config = write(tmp_path, "optim: {warmup_pochs: 13}\nwandb: {project: p}\n")
    with caplog.at_level(logging.WARNING, "dinov2"):
        cfg = resolve_config(config, ["a.b=1"], lenient=True)
        messages = [record.getMessage() for record in caplog.records]
    assert cfg == resolve_config("", [])
    assert messages == [
        'optim.warmup_pochs (c.yaml line 1) is not a config key (did you mean "optim.warmup_epochs"?); '
        "it is ignored",
        'wandb.project (c.yaml line 2) is not a config key (did you mean "tracking.wandb_project"?); '
        "it is ignored",
        "a.b (command line) is not a config key; it is ignored",
    ]


def test_lenient_does_not_excuse_wrong_values(slips):
    with pytest.raises(ConfigError) as caught:
        resolve_config(slips, [], lenient=True)
    assert "0y" in str(caught.value) and "warmup_pochs" not in str(caught.value)


def test_a_check_over_several_keys_waits_until_each_is_right(tmp_path):
    config = write(tmp_path, "student: {patch_size: four}\ncrops: {global_crops_size: 518}\n")
    with pytest.raises(ConfigError) as caught:
        resolve_config(config, [])
    assert str(caught.value) == (
        "student.patch_size (c.yaml line 1) is the string 'four', an integer of at least 1 is wanted"
    )


def test_references_between_keys_are_resolved(tmp_path):
    config = write(tmp_path, "ibot: {head_n_prototypes: '${dino.head_n_prototypes}'}\n")
    cfg = resolve_config(config, ["dino.head_n_prototypes=128"])
    assert OmegaConf.to_yaml(cfg).count("head_n_prototypes: 128") == 2
    pair = resolve_config("", ["crops.local_crops_scale=${crops.global_crops_scale}"])
    assert pair.crops.local_crops_scale == [0.32, 1.0]


def test_a_value_left_open_has_to_be_stated(tmp_path):
    config = write(tmp_path, "train:\n  dataset_path: ???\n")
    with pytest.raises(ConfigError, match=r"train\.dataset_path \(c\.yaml line 2\) is left open with \?\?\?"):
        resolve_config(config, [])
    assert resolve_config(config, ["train.dataset_path=A:root=/x"]).train.dataset_path == "A:root=/x"


@pytest.mark.parametrize("value", ["${optim.nothing}", "${x"])
def test_references_to_nothing_are_problems_of_their_keys(value):
    with pytest.raises(ConfigError) as caught:
        resolve_config("", [f"train.output_dir={value}", "train.dataset_path=${broken", "optim.epochs=0"])
    lines = str(caught.value).splitlines()
    assert lines[1].startswith("  1. train.dataset_path (command line) refers to something missing: ")
    assert lines[2].startswith("  2. train.output_dir (command line) refers to something missing: ")
    assert lines[3].startswith("  3. optim.epochs (command line) is the number 0")


def test_dead_keys_warn_only_away_from_their_default(caplog):
    # Defect 4.
    with caplog.at_level(logging.WARNING, "dinov2"):
        resolve_config("", ["train.saveckp_freq=20", "train.cache_dataset=true", "train.sshid="])
    assert caplog.records == []
    overrides = ["train.saveckp_freq=5", "train.cache_dataset=false", "train.sshid=13", "train.seed=3"]
    with caplog.at_level(logging.WARNING, "dinov2"):
        cfg = resolve_config("", overrides)
    texts = [record.getMessage() for record in caplog.records]
    assert [text.partition(" has no effect: ")[0] for text in texts] == [
        "train.saveckp_freq 5",
        "train.cache_dataset False",
        "train.sshid 13",
    ]
    assert "checkpointing.period" in texts[0] and "dataset string" in texts[2]
    assert cfg.train.seed == 3


def test_checkpointing_keys_are_live(tmp_path):
    # Defect 1: a whole `checkpointing:` block used to be ignored.
    cfg = resolve_config(write(tmp_path, "checkpointing: {period: 3750, max_to_keep: 2}\n"), [])
    assert (cfg.checkpointing.period, cfg.checkpointing.max_to_keep) == (3750, 2)


def test_no_config_file_is_the_packaged_default_and_says_so():
    # Defect 7.
    assert resolve("", []).infos == ("no config file is given: the packaged default config is used",)


def test_packaged_configs_by_name():
    assert load_config("eval/vits14_pretrain").student.arch == "vit_small"
    merged = load_and_merge_config("eval/vits14_pretrain")
    assert merged.crops.global_crops_size == 518 and merged.optim.epochs == 100
    with pytest.raises(
        ConfigError, match=r'no packaged config "eval/vits_pretrain" \(did you mean "eval/vit'
    ):
        load_config("eval/vits_pretrain")


@pytest.mark.parametrize(
    "statement",
    [
        "import dinov2.configs",
        "from dinov2.configs import resolve_config; resolve_config('', ['train.seed=1'])",
        "import dinov2.utils.config, argparse\n"
        "try: dinov2.utils.config.setup(argparse.Namespace(config_file='{slips}', opts=[], output_dir=''))\n"
        "except dinov2.errors.ConfigError as error: assert 'warmup_pochs' in str(error)\n"
        "else: raise SystemExit('accepted')",
    ],
)
def test_wrong_configs_are_found_before_torch_is_loaded(slips, statement):
    code = statement.replace("{slips}", slips) + "\nimport sys; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
