"""Combinations of keys that cannot work, and those that work otherwise than they look."""

import pytest

from dinov2.configs import resolve, resolve_config
from dinov2.configs.scaling import scaled_lr
from dinov2.configs.schema import ARCHITECTURE_SIZES
from dinov2.errors import ConfigError


def refusal(*overrides):
    with pytest.raises(ConfigError) as caught:
        resolve_config("", list(overrides))
    return str(caught.value)


def warnings(*overrides):
    return list(resolve("", list(overrides)).warnings)


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        # Defect 54.
        (
            ["student.patch_size=14"],
            "is 96, which student.patch_size 14 does not divide: 98 fits",
        ),
        (["crops.global_crops_size=225"], "student.patch_size 16 does not divide: 224 fits"),
        (["crops.local_crops_size=5"], "student.patch_size 16 does not divide: 16 fits"),
        # Defect 15.
        (["student.block_chunks=5"], "student.block_chunks 5 does not divide the 24 blocks of vit_large"),
        (["student.block_chunks=5"], "set it to 0 or one of 1, 2, 3, 4, 6, 8, 12, 24"),
        (["student.depth=4", "student.block_chunks=8"], "does not divide the 4 blocks"),
        (["student.arch=vit_small", "student.num_heads=5"], "num_heads 5 does not divide the width 384"),
        (["student.arch=vit_small", "student.embed_dim=100"], "num_heads 6 does not divide the width 100"),
        # Defect 21.
        (["student.arch=vit_lage"], "student.arch is 'vit_lage', one of \"vit_tiny\""),
        (["student.arch=resnet50"], "student.arch is 'resnet50', one of \"vit_tiny\""),
        # Lengths, pairs, losses, sources of weights.
        (
            ["optim.max_images=9", "optim.max_passes=2"],
            "max_images 9 and optim.max_passes 2.0 both state",
        ),
        (["ibot.mask_ratio_min_max=[0.5,0.1]"], "is [0.5, 0.1], the smaller number comes first"),
        (["crops.local_crops_scale=[0.4,0.1]"], "crops.local_crops_scale is [0.4, 0.1]"),
        (["crops.aspect_ratio=[2,0.5]"], "crops.aspect_ratio is [2.0, 0.5], the smaller number comes first"),
        (
            ["crops.local_crops_scale=[0.5,2]"],
            "crops.local_crops_scale is [0.5, 2], but shares of the image end at 1: lower it, or set "
            "crops.scale_reference=crop",
        ),
        (["crops.color_jitter=[0.4,0.4,0.2,0.6]"], "the last number of crops.color_jitter, hue, is 0.6"),
        (["crops.hed_jitter=0.1"], "crops.hed_jitter is 0.1 and crops.hed_jitter_prob 0: stain jitter needs"),
        (["crops.hed_jitter_prob=0.5"], "crops.hed_jitter is 0 and crops.hed_jitter_prob 0.5"),
        (["dino.loss_weight=0", "ibot.loss_weight=0"], "dino.loss_weight and ibot.loss_weight are both 0"),
        (["optim.scaling_rule=none"], "optim.scaling_rule is 'none' and optim.lr is 0"),
        (
            ["optim.accumulate_steps=4", "dino.koleo_scope=global"],
            "optim.accumulate_steps is 4 and dino.koleo_scope 'global', whose neighbours among all images of "
            "a step are not known while its batches come one by one: set dino.koleo_scope=rank or",
        ),
        (["student.pretrained_weights=a", "train.init_weights_from_chkpt=b"], "name different weights"),
        # Starting gently.
        (
            ["train.freeze_backbone_iterations=125000"],
            "train.freeze_backbone_iterations 125000 is not shorter than the 125000 iterations of "
            "optim.epochs 100, so the backbone would never learn: lower it to at most 124999",
        ),
        (
            ["train.freeze_backbone_iterations=20000", "optim.max_iterations=20000"],
            "not shorter than the 20000 iterations of optim.max_iterations 20000",
        ),
        (["train.freeze_blocks=25"], "train.freeze_blocks is 25, but vit_large has 24 blocks"),
        (["train.freeze_blocks=3", "student.depth=2"], "vit_large has 2 blocks: set it to at most 2"),
        (["student.lora_rank=8", "train.freeze_blocks=6"], "which train.freeze_blocks 6 contradicts"),
        # Ranges.
        (["train.batch_size_per_gpu=0"], "train.batch_size_per_gpu (command line) is the number 0"),
        (["dino.head_n_prototypes=0"], "dino.head_n_prototypes (command line) is the number 0"),
        (["checkpointing.period=0"], "checkpointing.period (command line) is the number 0"),
    ],
)
def test_refused_combinations(overrides, text):
    message = refusal(*overrides)
    assert text in message and "\n" not in message


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["optim.epochs=5"], ["optim.warmup_epochs 10", "freeze_last_layer_epochs 1", "6250", "at most 5"]),
        (["optim.max_iterations=60"], ["the 60 iterations of optim.max_iterations 60", "at most 0"]),
        (["optim.freeze_last_layer_epochs=101"], ["freeze_last_layer_epochs 101", "optim.epochs 100"]),
    ],
)
def test_warm_up_longer_than_the_run_names_all_three_lengths(overrides, parts):
    # Defect 12: a bare AssertionError in upstream.
    message = refusal(*overrides)
    assert all(part in message for part in parts), message


def test_a_run_that_only_warms_up_is_upstreams_right_but_worth_a_warning():
    assert "warms up to its very end" in warnings("optim.epochs=10")[0]
    assert "frozen until its very end" in warnings("optim.epochs=1", "optim.warmup_epochs=0")[0]
    assert warnings("optim.epochs=11") == []


@pytest.mark.parametrize(
    "overrides",
    [
        ["student.patch_size=14", "crops.local_crops_number=0"],  # no local crops, so their size is free
        ["student.arch=vit_small_memeff", "student.block_chunks=4"],
        ["student.arch=vit_small", "student.embed_dim=96", "student.num_heads=3", "student.depth=4"],
        ["optim.max_passes=0.5", "optim.epochs=1"],  # iterations are known once the data is open
        ["student.pretrained_weights=a.pth", "train.init_weights_from_chkpt=a.pth"],
        ["optim.scaling_rule=none", "optim.lr=1e-3"],
        ["optim.scaling_rule=linear_wrt_256"],
        ["dino.loss_weight=0"],
        ["ibot.loss_weight=0"],
        ["train.freeze_backbone_iterations=1000", "train.freeze_blocks=24", "optim.backbone_lr_mult=0.1"],
        ["student.lora_rank=8", "student.lora_alpha=32", "train.freeze_backbone_iterations=1000"],
        ["train.freeze_backbone_iterations=9999", "optim.max_images=10"],  # compared once the data is open
    ],
)
def test_accepted_combinations(overrides):
    assert warnings(*overrides) == []


def test_an_architecture_announced_in_the_table_is_accepted(monkeypatch):
    monkeypatch.setitem(ARCHITECTURE_SIZES, "vit_mini", (48, 3, 4))
    assert resolve_config("", ["student.arch=vit_mini"]).student.arch == "vit_mini"
    assert "does not divide the 3 blocks of vit_mini" in refusal(
        "student.arch=vit_mini", "student.block_chunks=2"
    )


def test_koleo_with_one_image_warns_instead_of_stopping():
    # Defect 48: a preset of a fork has a batch of one.
    assert "KoLeo finds no neighbour" in warnings("train.batch_size_per_gpu=1")[0]
    assert warnings("train.batch_size_per_gpu=1", "dino.koleo_scope=global") == []
    assert warnings("train.batch_size_per_gpu=1", "dino.koleo_loss_weight=0") == []


def test_lora_alpha_without_lora_warns():
    text = "student.lora_alpha 32 has no effect while student.lora_rank is 0"
    assert warnings("student.lora_alpha=32") == [text]


def test_ibot_head_sizes_without_effect_warn():
    assert warnings("ibot.head_n_prototypes=4096") == [
        "ibot.head_n_prototypes 4096 has no effect while ibot.separate_head is false: "
        "iBOT uses the DINO head with dino.head_n_prototypes 65536"
    ]
    assert warnings("ibot.head_n_prototypes=4096", "ibot.separate_head=true") == []
    assert warnings("ibot.head_n_prototypes=4096", "dino.head_n_prototypes=4096") == []


def test_a_stated_learning_rate_that_is_not_used_warns(monkeypatch):
    # Defect 5.
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("SLURM_NTASKS", raising=False)
    text = warnings("optim.lr=3e-4")[0]
    assert text.startswith("optim.lr 0.0003 is not used: optim.scaling_rule sqrt_wrt_1024 derives it from")
    # The value that a run of one process, or of four, wrote into its config.yaml is no contradiction.
    assert warnings("optim.lr=0.001") == []
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert warnings("optim.lr=0.002") == []
    assert "is not used" in warnings("optim.lr=0.001")[0]
    assert warnings("optim.lr=0.004", "optim.accumulate_steps=4") == []
    assert "is not used" in warnings("optim.lr=0.002", "optim.accumulate_steps=4")[0]


def test_accumulating_with_neighbours_of_a_batch_or_without_koleo():
    assert warnings("optim.accumulate_steps=4") == []
    assert warnings("optim.accumulate_steps=4", "dino.koleo_scope=global", "dino.koleo_loss_weight=0") == []


@pytest.mark.parametrize(
    ("rule", "batch", "expected"),
    [
        ("sqrt_wrt_1024", 256, 1e-4),  # the recipe for NCT
        ("sqrt_wrt_1024", 4096, 4e-4),
        ("sqrt_wrt_768", 192, 1e-4),
        ("linear_wrt_256", 64, 5e-5),
    ],
)
def test_scaled_learning_rates(rule, batch, expected):
    assert scaled_lr(2e-4, rule, batch) == pytest.approx(expected, rel=1e-12)


def test_where_a_run_goes_on_is_compared_with_what_it_goes_on_from():
    assert "no head.head_path names an earlier run" in warnings("optim.start_iter=3")[0]
    (text,) = warnings("head.head_path=run/eval/training_9999", "optim.start_iter=9999")
    assert "exported after iteration 9999, so the next one is 10000" in text
    assert warnings("head.head_path=run/eval/training_9999", "optim.start_iter=10000") == []


def test_scales_above_1_are_accepted_where_they_count_in_crops():
    cfg = resolve_config("", ["crops.scale_reference=crop", "crops.global_crops_scale=[1,4]"])
    assert list(cfg.crops.global_crops_scale) == [1.0, 4.0]
