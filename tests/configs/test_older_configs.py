"""Config files of DINOv2 and its histopathology forks load as they are, apart from their slips.

The texts below restate those files from the table of their values, whole sections included.
"""

import pytest
from omegaconf import OmegaConf

from dinov2.configs import resolve
from dinov2.configs.sources import flatten
from dinov2.errors import ConfigError
from tests.configs.test_schema import upstream_defaults
from tests.conftest import GOLDEN

SEED_FORK = {
    "train.batch_size_per_gpu": 256,
    "train.dataset_path": "CustomImageDataset:split=TRAIN:root=/data:extra=/data/tiles.csv",
    "train.OFFICIAL_EPOCH_LENGTH": 100,
    "train.centering": "sinkhorn_knopp",
    "student.arch": "vit_small",
    "student.patch_size": 14,
    "student.drop_path_rate": 0.4,
    "student.drop_path_uniform": False,
    "student.pretrained_weights": None,
    "teacher.momentum_teacher": 0.994,
    "optim.weight_decay_end": 0.2,
    "optim.base_lr": 2e-4,
    "crops.local_crops_size": 98,
    "evaluation.eval_period_iterations": 1000,
    "head.head_path": None,
}
UNI_FORK = {
    "ibot.separate_head": True,
    "train.batch_size_per_gpu": 96,
    "train.dataset_path": "Pathology:split=TRAIN:root=/data:extra=/data:sshid=13",
    "train.sshid": 13,
    "train.OFFICIAL_EPOCH_LENGTH": 1350,
    "train.centering": "sinkhorn_knopp",
    "train.init_weights_from_chkpt": "hf-hub:MahmoodLab/uni",
    "student.drop_path_uniform": False,
    "student.pretrained_weights": None,
    "student.qkv_bias": False,
    "teacher.teacher_temp": 0.1,
    "optim.base_lr": 3e-4,
    "optim.lr": 3e-4,
    "optim.clip_grad": 1.0,
    "checkpointing.period": 3750,
    "checkpointing.max_to_keep": 3,
    "head.head_path": None,
}


def write(tmp_path, settings):
    cfg = OmegaConf.create()
    for key, value in settings.items():
        OmegaConf.update(cfg, key, value, force_add=True)
    OmegaConf.save(cfg, tmp_path / "c.yaml")
    return str(tmp_path / "c.yaml")


@pytest.mark.parametrize("differences", [{}, SEED_FORK], ids=["upstream", "seed fork"])
def test_whole_files_load_without_a_word(tmp_path, differences):
    resolution = resolve(write(tmp_path, upstream_defaults() | differences), [])
    assert resolution.warnings == ()
    assert OmegaConf.select(resolution.cfg, "train.batch_size_per_gpu") == (256 if differences else 64)


def test_uni_fork_file_loads_with_its_ineffective_keys_named(tmp_path):
    # Defects 4, 5 and 27: sshid, lr, and a weight source given by name.
    resolution = resolve(write(tmp_path, upstream_defaults() | UNI_FORK), [])
    assert [text.split()[0] for text in resolution.warnings] == ["optim.lr", "train.sshid"]
    assert resolution.cfg.train.init_weights_from_chkpt == "hf-hub:MahmoodLab/uni"
    assert resolution.cfg.checkpointing.period == 3750


@pytest.mark.parametrize(
    ("fork", "slip", "hint"),
    [
        (SEED_FORK, {"student.num_register_tokens": "0y"}, "is the string '0y', an integer"),
        (UNI_FORK, {"optim.warmup_pochs": 13}, 'did you mean "optim.warmup_epochs"'),
    ],
)
def test_the_forks_slips_are_named(tmp_path, fork, slip, hint):
    # Defects 1 and 2.
    with pytest.raises(ConfigError) as caught:
        resolve(write(tmp_path, upstream_defaults() | fork | slip), [])
    assert hint in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("empty", [None, ""])
def test_no_weights_to_start_from_is_accepted_in_both_spellings(tmp_path, empty):
    # Defects 25 and 27: an empty init_weights_from_chkpt ended in UnboundLocalError.
    keys = ("train.init_weights_from_chkpt", "student.pretrained_weights", "head.head_path", "MODEL.WEIGHTS")
    resolution = resolve(write(tmp_path, dict.fromkeys(keys, empty)), [])
    assert not any(OmegaConf.select(resolution.cfg, key) for key in keys)


def test_the_architecture_is_the_configs_own(tmp_path):
    # Defect 26: the fork built ViT-S/14 whatever the config said.
    student = resolve("", ["student.arch=vit_base", "student.num_register_tokens=4"]).cfg.student
    assert (student.arch, student.num_register_tokens) == ("vit_base", 4)


def test_recorded_reference_configs_load(monkeypatch):
    from dinov2.configs.schema import ARCHITECTURE_SIZES

    monkeypatch.setitem(ARCHITECTURE_SIZES, "vit_golden_tiny", (48, 4, 4))
    for path in sorted(GOLDEN.glob("meta_*.yaml")):
        cfg = resolve(str(path), []).cfg
        for key, value in flatten(OmegaConf.to_container(OmegaConf.load(path))):
            assert OmegaConf.select(cfg, key) == value, (path.name, key)
