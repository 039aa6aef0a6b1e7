"""The schema, the default YAML, the documentation and upstream's own defaults say the same."""

import dataclasses

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from dinov2.configs import dinov2_default_config, load_config, reference
from dinov2.configs.keys import WrongValueError
from dinov2.configs.schema import ARCHITECTURE_SIZES, DEAD_KEYS, KEYS, ModulePrecision, iterate_keys
from dinov2.configs.sources import flatten
from dinov2.models import ARCHITECTURES
from dinov2.models.vision_transformer import SIZES
from tests.conftest import GOLDEN, REPO

# DINOv2's defaults, written down independently of the schema.
UPSTREAM = """
MODEL: {WEIGHTS: ''}
compute_precision: {grad_scaler: true}
dino: {loss_weight: 1.0, head_n_prototypes: 65536, head_bottleneck_dim: 256, head_nlayers: 3,
  head_hidden_dim: 2048, koleo_loss_weight: 0.1}
ibot: {loss_weight: 1.0, mask_sample_probability: 0.5, mask_ratio_min_max: [0.1, 0.5], separate_head: false,
  head_n_prototypes: 65536, head_bottleneck_dim: 256, head_nlayers: 3, head_hidden_dim: 2048}
train: {batch_size_per_gpu: 64, dataset_path: 'ImageNet:split=TRAIN', output_dir: ., saveckp_freq: 20,
  seed: 0, num_workers: 10, OFFICIAL_EPOCH_LENGTH: 1250, cache_dataset: true, centering: centering}
student: {arch: vit_large, patch_size: 16, drop_path_rate: 0.3, layerscale: 1.0e-5, drop_path_uniform: true,
  pretrained_weights: '', ffn_layer: mlp, block_chunks: 0, qkv_bias: true, proj_bias: true, ffn_bias: true,
  num_register_tokens: 0, interpolate_antialias: false, interpolate_offset: 0.1}
teacher: {momentum_teacher: 0.992, final_momentum_teacher: 1, warmup_teacher_temp: 0.04, teacher_temp: 0.07,
  warmup_teacher_temp_epochs: 30}
optim: {epochs: 100, weight_decay: 0.04, weight_decay_end: 0.4, base_lr: 0.004, lr: 0.0, warmup_epochs: 10,
  min_lr: 1.0e-6, clip_grad: 3.0, freeze_last_layer_epochs: 1, scaling_rule: sqrt_wrt_1024,
  patch_embed_lr_mult: 0.2, layerwise_decay: 0.9, adamw_beta1: 0.9, adamw_beta2: 0.999}
crops: {global_crops_scale: [0.32, 1.0], local_crops_number: 8, local_crops_scale: [0.05, 0.32],
  global_crops_size: 224, local_crops_size: 96}
evaluation: {eval_period_iterations: 12500}
"""

# Keys of this package alone, with the defaults that keep upstream's behaviour.
ADDED = {
    "train.device": "auto",
    "train.log_period": 10,
    "train.init_weights_from_chkpt": "",
    "train.sampler_type": "sharded_infinite",
    "train.sshid": "",
    "optim.max_iterations": None,
    "optim.max_images": None,
    "optim.max_passes": None,
    "checkpointing.period": None,
    "checkpointing.max_to_keep": 3,
    "student.embed_dim": None,
    "student.depth": None,
    "student.num_heads": None,
    "crops.horizontal_flip_prob": 0.5,
    "crops.vertical_flip_prob": 0.0,
    "crops.gaussian_blur": "effective",
    "head.head_path": None,
    "dino.koleo_scope": "rank",
    "student.mlp_ratio": None,
    "student.norm_eps": 1e-6,
    "student.pos_embed_resampling": "interpolate",
    "student.patch_embed_resampling": "none",
    "student.lora_rank": 0,
    "student.lora_alpha": 16.0,
    "train.freeze_backbone_iterations": 0,
    "train.freeze_blocks": 0,
    "train.self_check": "stop",
    "optim.backbone_lr_mult": 1.0,
    "optim.start_iter": 0,
    "crops.mean": [0.485, 0.456, 0.406],
    "crops.std": [0.229, 0.224, 0.225],
    "head.on_missing": "stop",
    "crops.pipeline": "reference",
    "crops.scale_reference": "image",
    "crops.aspect_ratio": [3 / 4, 4 / 3],
    "crops.quarter_turn_prob": 0.0,
    "crops.color_jitter": [0.4, 0.4, 0.2, 0.1],
    "crops.color_jitter_prob": 0.8,
    "crops.grayscale_prob": 0.2,
    "crops.solarize_prob": 0.2,
    "crops.hed_jitter": 0.0,
    "crops.hed_jitter_prob": 0.0,
    "train.path_map": {},
    "train.max_bad_fraction": 0.001,
    "train.worker_timeout": 900.0,
    "train.prefetch_factor": None,
    "train.worker_start_method": "default",
    "compute_precision.hybrid_shard_size": None,
    "train.activation_checkpointing": "none",
    "train.compile": None,
    "train.cuda_graphs": None,
    "train.max_bad_steps": 24,
    "train.process_timeout": 1800.0,
    "optim.accumulate_steps": 1,
    "checkpointing.keep_every": None,
    "checkpointing.asynchronous": True,
    "evaluation.monitor_period": None,
    "evaluation.monitor_samples": 512,
    "evaluation.monitor_dataset_path": "",
    "evaluation.train_dataset_path": "",
    "evaluation.val_dataset_path": "",
    "evaluation.nb_knn": 20,
    "evaluation.batch_size": 64,
    "evaluation.best_checkpoint": "auto",
    "evaluation.early_stop": False,
    "evaluation.patience": 5,
    "evaluation.on_collapse": "warn",
    "evaluation.slides.path": "",
    "evaluation.slides.labels": "",
    "evaluation.slides.target": "",
    "evaluation.slides.patient_column": "patient",
    "evaluation.slides.slide_column": "slide",
    "evaluation.slides.mpp": 0.5,
    "evaluation.slides.tile_size": None,
    "evaluation.slides.max_tiles": 64,
    "evaluation.slides.min_tissue": 0.25,
    "evaluation.slides.assume_mpp": None,
    "evaluation.slides.folds": 5,
    "evaluation.slides.aggregator": "mean",
    "evaluation.slides.period": None,
    "tracking.tensorboard": False,
    "tracking.wandb": "off",
    "tracking.wandb_project": "dinov2",
}


def upstream_defaults():
    settings = dict(flatten(yaml.safe_load(UPSTREAM)))
    for network in ("teacher", "student"):
        for module in ("backbone", "dino_head", "ibot_head"):
            prefix = f"compute_precision.{network}.{module}"
            student_head = network == "student" and module != "backbone"
            settings[f"{prefix}.sharding_strategy"] = "SHARD_GRAD_OP"
            settings[f"{prefix}.mixed_precision.param_dtype"] = "fp16"
            settings[f"{prefix}.mixed_precision.reduce_dtype"] = "fp32" if student_head else "fp16"
            settings[f"{prefix}.mixed_precision.buffer_dtype"] = "fp32"
    return settings


def test_default_yaml_equals_schema_in_value_type_and_order():
    settings = dict(flatten(OmegaConf.to_container(load_config("ssl_default_config"))))
    assert list(settings) == list(KEYS)
    for path, value in settings.items():
        assert value == KEYS[path].default and type(value) is type(KEYS[path].default), path


def test_defaults_are_upstreams_plus_the_added_keys():
    assert {path: key.default for path, key in KEYS.items()} == upstream_defaults() | ADDED


def test_every_key_of_the_recorded_reference_configs_is_known():
    recorded = yaml.safe_load((GOLDEN / "meta_centering_shared.yaml").read_text())
    assert set(dict(flatten(recorded))) <= set(KEYS)


def test_every_key_has_one_line_of_meaning_and_a_default_it_accepts():
    for path, key in KEYS.items():
        assert key.rule.meaning and "\n" not in key.rule.meaning, path
        assert key.convert(key.default) == key.default, path


def test_dead_keys_exist_and_say_what_to_do_instead():
    assert set(DEAD_KEYS) <= set(KEYS)
    assert all(DEAD_KEYS.values())


def test_precision_block_is_one_class_used_six_times():
    block = {key.path for key in iterate_keys(ModulePrecision())}
    for network in ("teacher", "student"):
        for module in ("backbone", "dino_head", "ibot_head"):
            prefix = f"compute_precision.{network}.{module}."
            assert {path.removeprefix(prefix) for path in KEYS if path.startswith(prefix)} == block


def test_architecture_sizes_equal_those_of_the_models():
    """There are two, as configs are read without PyTorch."""
    assert ARCHITECTURE_SIZES == SIZES
    assert set(SIZES) == set(ARCHITECTURES)
    for name, sizes in SIZES.items():
        with torch.device("meta"):
            model = ARCHITECTURES[name](patch_size=16, img_size=32)
        assert (model.embed_dim, model.n_blocks, model.num_heads) == sizes


def test_documentation_lists_exactly_the_schema():
    _, marker, tables = (REPO / "docs" / "configuration.md").read_text("utf-8").partition(reference.MARKER)
    assert marker, "the marker line is missing"
    assert tables == reference.tables(), "run: python -m dinov2.configs.reference docs/configuration.md"


def test_renew_replaces_only_the_tables(tmp_path):
    document = tmp_path / "configuration.md"
    document.write_text(f"prose\n{reference.MARKER}| old |\n")
    reference.renew(document)
    assert document.read_text() == f"prose\n{reference.MARKER}{reference.tables()}"
    assert "| `optim.max_passes` | float or null | `null` | passes over the dataset |" in document.read_text()


@pytest.mark.parametrize(
    ("path", "value", "converted"),
    [
        ("optim.base_lr", 1, 1.0),
        ("optim.epochs", 10.0, 10),
        ("optim.max_images", 1e6, 1_000_000),
        ("optim.max_images", None, None),
        ("optim.clip_grad", None, None),
        ("crops.global_crops_scale", [1, 1], [1.0, 1.0]),
        ("student.pretrained_weights", None, None),
        ("train.sshid", 13, 13),
        ("train.sshid", "448", "448"),
        ("student.drop_path_uniform", False, False),
        ("train.path_map", {"/data": "/nfs"}, {"/data": "/nfs"}),
        ("train.dataset_path", ["2*A:root=/x", "B:root=/y"], ["2*A:root=/x", "B:root=/y"]),
    ],
)
def test_accepted_values(path, value, converted):
    result = KEYS[path].convert(value)
    assert result == converted and type(result) is type(converted)


@pytest.mark.parametrize(
    ("path", "value", "text"),
    [
        ("student.num_register_tokens", "0y", "is the string '0y', an integer of at least 0 is wanted"),
        ("optim.epochs", 2.5, "is the number 2.5, an integer of at least 1 is wanted"),
        ("optim.epochs", True, "is the boolean true, an integer of at least 1 is wanted"),
        ("optim.epochs", None, "is null, an integer of at least 1 is wanted"),
        ("optim.base_lr", "1e-4", "is the string '1e-4', a number of at least 0 is wanted"),
        ("optim.base_lr", float("nan"), "is the number nan, a number of at least 0 is wanted"),
        ("optim.base_lr", float("inf"), "is the number inf, a number of at least 0 is wanted"),
        ("optim.max_passes", 0, "is the number 0, a number above 0 or null is wanted"),
        ("student.drop_path_rate", 1.0, "is the number 1.0, a number of at least 0 and below 1 is wanted"),
        ("student.qkv_bias", 1, "is the number 1, true or false is wanted"),
        ("student.arch", 3, "is the number 3, a string is wanted"),
        ("student.arch", {"name": "x"}, "is the mapping {'name': 'x'}, a string is wanted"),
        ("train.centering", "sinkhorn", 'one of "centering", "sinkhorn_knopp" is wanted'),
        ("optim.scaling_rule", "sqrt", "is the string 'sqrt', \"sqrt_wrt_<images>\""),
        ("optim.scaling_rule", "sqrt_wrt_0", "is wanted"),
        ("crops.global_crops_scale", [0.3], "is the list [0.3], a list of two numbers above 0"),
        ("crops.global_crops_scale", [0.0, 1.0], "a list of two numbers above 0 is wanted"),
        ("crops.color_jitter", [0.4, 0.4], "a list of four numbers of at least 0 is wanted"),
        ("crops.global_crops_scale", 0.3, "is the number 0.3, a list of two numbers"),
        ("crops.mean", [0.5, 0.5], "is the list [0.5, 0.5], a list of three numbers of at least 0"),
        ("ibot.mask_ratio_min_max", [0.1, "a"], "is the list [0.1, 'a'], a list of two numbers"),
        ("train.path_map", "/data", "is the string '/data', a mapping of strings to strings is wanted"),
        ("train.path_map", {"/data": 13}, "a mapping of strings to strings is wanted"),
        ("train.dataset_path", [], "is the list [], a string or a list of strings is wanted"),
        ("train.dataset_path", ["A", 2], "is the list ['A', 2], a string or a list of strings is wanted"),
    ],
)
def test_refused_values(path, value, text):
    with pytest.raises(WrongValueError) as caught:
        KEYS[path].convert(value)
    assert text in str(caught.value)


def test_default_config_is_a_dict_config_with_attribute_access():
    assert dinov2_default_config.student.arch == "vit_large"
    assert all(not dataclasses.is_dataclass(value) for value in dinov2_default_config.values())
