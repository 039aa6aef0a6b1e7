"""Every shipped YAML file loads, states only differences and opens with what a reader needs."""

import re

import pytest
import yaml
from omegaconf import OmegaConf

from dinov2.configs import CONFIGS_DIR, dinov2_default_config, resolve
from dinov2.configs.schema import ARCHITECTURE_SIZES
from dinov2.configs.sources import flatten

RECIPES = sorted(path for path in CONFIGS_DIR.rglob("*.yaml") if path.parent != CONFIGS_DIR)
SHIPPED = {
    *(f"train/{name}.yaml" for name in ("vits14-nct", "vitg14-nct", "vits14-tcga", "vitg14-tcga")),
    *(f"train/{name}.yaml" for name in ("vitl16-tcga-dino", "vitl16_short", "vitl14", "vitg14")),
    "train/vits14-quickstart.yaml",
    *(f"eval/vit{size}14{registers}_pretrain.yaml" for size in "sblg" for registers in ("", "_reg4")),
}
OPENING = ("# Purpose", "# Command", "# Hardware", "# Expected")

each_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")


def stated(path):
    return dict(flatten(OmegaConf.to_container(OmegaConf.load(path))))


def resolved(name):
    return resolve(str(CONFIGS_DIR / name), []).cfg


def test_the_promised_recipes_are_there():
    assert {str(path.relative_to(CONFIGS_DIR)) for path in RECIPES} >= SHIPPED


@each_recipe
def test_resolves_without_a_warning(path):
    resolution = resolve(str(path), [])
    assert resolution.warnings == ()
    for key, value in stated(path).items():
        assert OmegaConf.select(resolution.cfg, key) == value


@each_recipe
def test_states_only_differences(path):
    for key, value in stated(path).items():
        assert OmegaConf.select(dinov2_default_config, key) != value, f"{key} equals the default"


@each_recipe
def test_opens_with_purpose_command_hardware_and_result(path):
    header = []
    for line in path.read_text("utf-8").splitlines():
        if not line.startswith("#"):
            break
        header.append(line)
    found = [line for line in header if line.startswith(OPENING)]
    assert len(found) == len(OPENING) and all(map(str.startswith, found, OPENING))
    named = re.findall(r"--config-file (\S+)", "\n".join(header))
    assert set(named) <= {f"dinov2/configs/{path.parent.name}/{path.name}"}


@each_recipe
def test_is_ascii_and_names_no_personal_place(path):
    text = path.read_text("ascii")
    assert path.name.isascii() and all(f"/{place}/" not in text for place in ("home", "root", "nfs"))
    for key in ("train.output_dir", "student.pretrained_weights", "head.head_path"):
        assert key not in stated(path), "locations belong on the command line"


@pytest.mark.parametrize(("name", "batch"), [("vits14", 256), ("vitg14", 32)])
@pytest.mark.parametrize("dataset", ["nct", "tcga"])
def test_histology_recipes_follow_the_published_settings(name, batch, dataset):
    # Roth et al., ISBI 2024, table of the finetuning recipe. Drop path never reached their backbone.
    cfg = resolved(f"train/{name}-{dataset}.yaml")
    assert cfg.train.batch_size_per_gpu == batch and cfg.train.centering == "sinkhorn_knopp"
    assert (cfg.student.patch_size, cfg.student.drop_path_rate) == (14, 0.0)
    assert (cfg.crops.global_crops_size, cfg.crops.local_crops_size) == (224, 98)
    assert (cfg.crops.horizontal_flip_prob, cfg.crops.vertical_flip_prob) == (0.5, 0.5)
    assert (cfg.optim.base_lr, cfg.optim.min_lr, cfg.optim.scaling_rule) == (2e-4, 1e-6, "sqrt_wrt_1024")
    assert (cfg.optim.weight_decay, cfg.optim.weight_decay_end) == (0.04, 0.2)
    assert (cfg.teacher.momentum_teacher, cfg.teacher.teacher_temp) == (0.994, 0.07)
    assert (cfg.dino.head_n_prototypes, cfg.ibot.separate_head) == (65536, False)


@pytest.mark.parametrize(
    "name", ["vits14-nct", "vitg14-nct", "vits14-tcga", "vitg14-tcga", "vitl16-tcga-dino"]
)
def test_finetuning_recipes_freeze_half_of_the_blocks_and_say_how_not_to(name):
    cfg = resolved(f"train/{name}.yaml")
    depth = ARCHITECTURE_SIZES[cfg.student.arch][1]
    assert cfg.train.freeze_blocks == depth // 2
    header = (CONFIGS_DIR / "train" / f"{name}.yaml").read_text().partition("\ntrain:")[0]
    assert "# Gentle start: " in header and "train.freeze_blocks=0 gives back" in header
    assert resolve(str(CONFIGS_DIR / "train" / f"{name}.yaml"), ["train.freeze_blocks=0"]).warnings == ()


def test_nct_recipes_run_ten_thousand_iterations():
    for name in ("vits14", "vitg14"):
        cfg = resolved(f"train/{name}-nct.yaml")
        assert cfg.optim.epochs * cfg.train.OFFICIAL_EPOCH_LENGTH == 10_000
        assert cfg.optim.warmup_epochs * cfg.train.OFFICIAL_EPOCH_LENGTH == 1_000
        assert cfg.evaluation.eval_period_iterations == 1_000


def test_uni_recipe_mends_the_original():
    # Defects 1, 5, 6 and 23: the misspelt warm-up, the unused lr, the rule's name, UNI's missing biases.
    cfg = resolved("train/vitl16-tcga-dino.yaml")
    assert cfg.optim.warmup_epochs == 13 and cfg.student.qkv_bias is True
    assert cfg.optim.scaling_rule == "sqrt_wrt_1024" and cfg.optim.lr == 0
    assert (cfg.student.arch, cfg.student.patch_size, cfg.crops.local_crops_size) == ("vit_large", 16, 96)
    assert cfg.ibot.separate_head and cfg.checkpointing.period == 3750


@pytest.mark.parametrize(
    ("name", "arch", "batch"), [("vitl14", "vit_large", 32), ("vitg14", "vit_giant2", 12)]
)
def test_upstreams_long_presets(name, arch, batch):
    cfg = resolved(f"train/{name}.yaml")
    expected = yaml.safe_load(f"""
        dino: {{head_n_prototypes: 131072, head_bottleneck_dim: 384}}
        ibot: {{separate_head: true, head_n_prototypes: 131072, head_bottleneck_dim: 256}}
        train: {{batch_size_per_gpu: {batch}, dataset_path: ImageNet22k, centering: sinkhorn_knopp}}
        student: {{arch: {arch}, patch_size: 14, drop_path_rate: 0.4, ffn_layer: swiglufused}}
        student.block_chunks: 4
        teacher: {{momentum_teacher: 0.994}}
        optim: {{epochs: 500, weight_decay_end: 0.2, base_lr: 2.0e-4, warmup_epochs: 80}}
        optim.layerwise_decay: 1.0
        crops: {{local_crops_size: 98}}
    """)
    for key, value in flatten(expected):
        assert OmegaConf.select(cfg, key) == value, key


def test_upstreams_short_preset():
    cfg = resolved("train/vitl16_short.yaml")
    assert cfg == OmegaConf.merge(dinov2_default_config, {"student": {"block_chunks": 4}})


@pytest.mark.parametrize("registers", ["", "_reg4"])
@pytest.mark.parametrize(
    ("size", "arch"), [("s", "vit_small"), ("b", "vit_base"), ("l", "vit_large"), ("g", "vit_giant2")]
)
def test_evaluation_presets(size, arch, registers):
    cfg = resolved(f"eval/vit{size}14{registers}_pretrain.yaml")
    assert (cfg.student.arch, cfg.student.patch_size) == (arch, 14)
    assert cfg.student.ffn_layer == ("swiglufused" if size == "g" else "mlp")
    assert (cfg.crops.global_crops_size, cfg.crops.local_crops_size) == (518, 98)
    exact = (
        cfg.student.num_register_tokens,
        cfg.student.interpolate_antialias,
        cfg.student.interpolate_offset,
    )
    assert exact == ((4, True, 0.0) if registers else (0, False, 0.1))


def test_quickstart_computes_in_float32_with_small_crops():
    cfg = resolved("train/vits14-quickstart.yaml")
    formats = {
        value
        for key, value in flatten(OmegaConf.to_container(cfg))
        if key.startswith("compute_precision.") and key.endswith("_dtype")
    }
    assert formats == {"fp32"} and not cfg.compute_precision.grad_scaler
    assert (cfg.crops.global_crops_size, cfg.crops.local_crops_size) == (112, 56)
    assert (cfg.student.arch, cfg.student.patch_size) == ("vit_small", 14)
