"""Checks that concern several keys at once; each names the keys it weighs and what to change.

A check reads values from a flat mapping ``{"optim.epochs": 100, ...}`` and yields :class:`Finding` s. Keys
whose own value was refused are missing from that mapping, and a check that needs one is skipped.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dinov2.configs.scaling import is_scaled
from dinov2.configs.schema import ARCHITECTURE_SIZES, AUTO, DEAD_KEYS, KEYS
from dinov2.errors import nearest

Values = Mapping[str, Any]

CROP_SCALES = ("crops.global_crops_scale", "crops.local_crops_scale")


@dataclass(frozen=True)
class Finding:
    """What a check has to say; ``fatal`` stops the run, the rest are warnings."""

    text: str
    fatal: bool = True


def warn(text: str) -> Finding:
    return Finding(text, fatal=False)


def find(values: Values) -> Iterator[Finding]:
    """Run every check on the values that are right by themselves."""
    for check in CHECKS:
        try:
            yield from check(values)
        except KeyError as error:
            if error.args[0] not in KEYS:
                raise


def crop_sizes(values: Values) -> Iterator[Finding]:
    if values["student.arch"] == AUTO:
        return  # the patch size is read from the weights
    patch = values["student.patch_size"]
    names = ["global", "local"] if values["crops.local_crops_number"] > 0 else ["global"]
    for name in names:
        size = values[f"crops.{name}_crops_size"]
        if size % patch:
            fits = max(round(size / patch), 1) * patch
            yield Finding(
                f"crops.{name}_crops_size is {size}, which student.patch_size {patch} does not divide: "
                f"{fits} fits"
            )


def ordered_pairs(values: Values) -> Iterator[Finding]:
    for key in ("ibot.mask_ratio_min_max", *CROP_SCALES, "crops.aspect_ratio"):
        low, high = values.get(key, (0, 0))
        if low > high:
            yield Finding(f"{key} is [{low}, {high}], the smaller number comes first: [{high}, {low}]")


def crop_scales(values: Values) -> Iterator[Finding]:
    if values["crops.scale_reference"] == "crop":
        return
    for key in CROP_SCALES:
        low, high = values.get(key, (0, 0))
        if high > 1:
            yield Finding(
                f"{key} is [{low:g}, {high:g}], but shares of the image end at 1: lower it, or set "
                "crops.scale_reference=crop, by which scales count in areas of the crop"
            )


def crop_colours(values: Values) -> Iterator[Finding]:
    hue = values["crops.color_jitter"][3]
    if hue > 0.5:
        yield Finding(
            f"the last number of crops.color_jitter, hue, is {hue:g}: half a turn of the colour circle, 0.5, "
            "reaches every colour and is the most"
        )
    strength, probability = values["crops.hed_jitter"], values["crops.hed_jitter_prob"]
    if (strength > 0) != (probability > 0):
        yield Finding(
            f"crops.hed_jitter is {strength:g} and crops.hed_jitter_prob {probability:g}: stain jitter needs "
            "both above 0, and none is both at 0"
        )


def architecture(values: Values) -> Iterator[Finding]:
    arch = values["student.arch"].removesuffix("_memeff")
    if arch == AUTO:
        return  # everything is read from the weights, once they are opened
    if arch not in ARCHITECTURE_SIZES:
        accepted = (*ARCHITECTURE_SIZES, AUTO)
        known = ", ".join(f'"{name}"' for name in accepted)
        hint = nearest(arch, accepted)
        yield Finding(f"student.arch is '{arch}', one of {known} is wanted{hint}")
        return
    sizes = zip(("embed_dim", "depth", "num_heads"), ARCHITECTURE_SIZES[arch], strict=True)
    width, depth, heads = (values[f"student.{name}"] or size for name, size in sizes)
    if width % heads:
        yield Finding(
            f"student.num_heads {heads} does not divide the width {width} of the attention: set "
            f"student.num_heads to one of {_divisors(width)} or change student.embed_dim"
        )
    chunks = values["student.block_chunks"]
    if chunks and depth % chunks:
        yield Finding(
            f"student.block_chunks {chunks} does not divide the {depth} blocks of {arch}: "
            f"set it to 0 or one of {_divisors(depth)}"
        )


def run_length(values: Values) -> Iterator[Finding]:
    names = ("optim.max_iterations", "optim.max_images", "optim.max_passes")
    given = [name for name in names if values[name] is not None]
    if len(given) > 1:
        stated = " and ".join(f"{name} {values[name]}" for name in given)
        yield Finding(f"{stated} both state the length of the run: leave one, or none to use optim.epochs")
    elif not given or given == ["optim.max_iterations"]:
        # How many iterations a number of images or passes makes is known only once the data is open.
        yield from _warm_up_fits(values)


def _warm_up_fits(values: Values) -> Iterator[Finding]:
    epoch = values["train.OFFICIAL_EPOCH_LENGTH"]
    warmup, frozen = values["optim.warmup_epochs"], values["optim.freeze_last_layer_epochs"]
    if values["optim.max_iterations"] is not None:
        total, run = values["optim.max_iterations"], f"optim.max_iterations {values['optim.max_iterations']}"
    else:
        total, run = values["optim.epochs"] * epoch, f"optim.epochs {values['optim.epochs']}"
    backbone_frozen = values["train.freeze_backbone_iterations"]
    if backbone_frozen >= total:
        yield Finding(
            f"train.freeze_backbone_iterations {backbone_frozen} is not shorter than the {total} iterations "
            f"of {run}, so the backbone would never learn: lower it to at most {total - 1}, or make the run "
            "longer"
        )
    state = (
        f"optim.warmup_epochs {warmup} and optim.freeze_last_layer_epochs {frozen} (of {epoch} iterations "
        f"each, train.OFFICIAL_EPOCH_LENGTH) do not fit into the {total} iterations of {run}"
    )
    if max(warmup, frozen) * epoch > total:
        yield Finding(f"{state}: lower them to at most {total // epoch}, or make the run longer")
    elif max(warmup, frozen) * epoch == total:
        what = "warms up to" if warmup >= frozen else "keeps the last layer frozen until"
        yield warn(
            f"the run {what} its very end: {run} is not longer than optim.warmup_epochs {warmup} or "
            f"optim.freeze_last_layer_epochs {frozen}"
        )


def losses(values: Values) -> Iterator[Finding]:
    if values["dino.loss_weight"] == 0 and values["ibot.loss_weight"] == 0:
        yield Finding(
            "dino.loss_weight and ibot.loss_weight are both 0, so there is no loss for a head: "
            "set one of them above 0"
        )
    alone = values["train.batch_size_per_gpu"] == 1 and values["dino.koleo_scope"] == "rank"
    if alone and values["dino.koleo_loss_weight"] > 0:
        yield warn(
            "train.batch_size_per_gpu is 1, so KoLeo finds no neighbour and is left out: "
            "use dino.koleo_scope=global, a larger batch or dino.koleo_loss_weight=0"
        )


def accumulation(values: Values) -> Iterator[Finding]:
    steps = values["optim.accumulate_steps"]
    everywhere = values["dino.koleo_loss_weight"] > 0 and values["dino.koleo_scope"] == "global"
    if steps > 1 and everywhere:
        yield Finding(
            f"optim.accumulate_steps is {steps} and dino.koleo_scope 'global', whose neighbours among all "
            "images of a step are not known while its batches come one by one: set dino.koleo_scope=rank or "
            "optim.accumulate_steps=1"
        )


def ibot_head(values: Values) -> Iterator[Finding]:
    if values["ibot.separate_head"]:
        return
    for name in ("head_n_prototypes", "head_bottleneck_dim", "head_nlayers", "head_hidden_dim"):
        key = f"ibot.{name}"
        if values[key] not in (KEYS[key].default, values[f"dino.{name}"]):
            yield warn(
                f"{key} {values[key]} has no effect while ibot.separate_head is false: "
                f"iBOT uses the DINO head with dino.{name} {values[f'dino.{name}']}"
            )


def learning_rate(values: Values) -> Iterator[Finding]:
    rule, lr, base = values["optim.scaling_rule"], values["optim.lr"], values["optim.base_lr"]
    if rule == "none":
        if lr == 0:
            yield Finding(
                "optim.scaling_rule is 'none' and optim.lr is 0: state optim.lr, which is then used as it is"
            )
    elif lr and not is_scaled(
        lr, base, rule, values["train.batch_size_per_gpu"], values["optim.accumulate_steps"]
    ):
        yield warn(
            f"optim.lr {lr:g} is not used: optim.scaling_rule {rule} derives it from optim.base_lr {base:g}; "
            "to use optim.lr as it is, set optim.scaling_rule=none"
        )


def weight_sources(values: Values) -> Iterator[Finding]:
    one, other = values["student.pretrained_weights"], values["train.init_weights_from_chkpt"]
    if one and other and one != other:
        yield Finding(
            f'student.pretrained_weights "{one}" and train.init_weights_from_chkpt "{other}" name different '
            "weights to start from: leave one of them empty"
        )


def frozen_parts(values: Values) -> Iterator[Finding]:
    frozen, rank = values["train.freeze_blocks"], values["student.lora_rank"]
    if rank and frozen:
        yield Finding(
            f"student.lora_rank {rank} freezes the weights of all blocks and trains updates of all of them, "
            f"which train.freeze_blocks {frozen} contradicts: set one of the two to 0"
        )
    alpha = values["student.lora_alpha"]
    if not rank and alpha != KEYS["student.lora_alpha"].default:
        yield warn(f"student.lora_alpha {alpha:g} has no effect while student.lora_rank is 0")
    arch = values["student.arch"].removesuffix("_memeff")
    if arch in ARCHITECTURE_SIZES:  # with auto, the number of blocks is known once the weights are read
        depth = values["student.depth"] or ARCHITECTURE_SIZES[arch][1]
        if frozen > depth:
            yield Finding(
                f"train.freeze_blocks is {frozen}, but {arch} has {depth} blocks: set it to at most {depth}"
            )


def continuing(values: Values) -> Iterator[Finding]:
    start, head_path = values["optim.start_iter"], values["head.head_path"]
    if start and not head_path:
        yield warn(
            f"optim.start_iter {start} skips the beginning of schedules and data, though no head.head_path "
            "names an earlier run to go on from"
        )
    exported = re.search(r"training_(\d+)/?$", head_path or "")
    if start and exported and int(exported[1]) + 1 != start:
        yield warn(
            f"optim.start_iter is {start}, but head.head_path {head_path} was exported after iteration "
            f"{exported[1]}, so the next one is {int(exported[1]) + 1}"
        )


def labelled_images(values: Values) -> Iterator[Finding]:
    keys = ("evaluation.train_dataset_path", "evaluation.val_dataset_path")
    named = [key for key in keys if values[key]]
    if len(named) == 1:
        (missing,) = set(keys) - set(named)
        yield Finding(
            f"{named[0]} is '{values[named[0]]}' but {missing} is empty: k-NN in the loop learns from one "
            "set of labelled images and is judged by another, so name both, or leave both empty"
        )


def labelled_slides(values: Values) -> Iterator[Finding]:
    keys = [f"evaluation.slides.{name}" for name in ("path", "labels", "target")]
    named = [key for key in keys if values[key]]
    missing = [key for key in keys if not values[key]]
    if named and missing:
        yield Finding(
            f"{named[0]} is '{values[named[0]]}' but {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} empty: to score patients in the loop, name slides, a "
            "table and its column, or leave all three empty"
        )
    if missing:
        return
    every, period = _monitor_period(values), values["evaluation.slides.period"]
    if every <= 0:
        yield Finding(
            f"evaluation.slides.path is '{values['evaluation.slides.path']}' but nothing is evaluated in the "
            f"loop (evaluation.monitor_period {values['evaluation.monitor_period']}): set a period, or leave "
            "the slides out"
        )
    elif period is not None and period % every:
        yield Finding(
            f"evaluation.slides.period is {period}, which the {every} iterations between evaluations in the "
            f"loop (evaluation.monitor_period) do not divide: {max(round(period / every), 1) * every} fits"
        )


def _monitor_period(values: Values) -> int:
    period = values["evaluation.monitor_period"]
    return values["evaluation.eval_period_iterations"] if period is None else period


def best_iteration(values: Values) -> Iterator[Finding]:
    wanted, early = values["evaluation.best_checkpoint"], values["evaluation.early_stop"]
    if wanted.startswith("slide_") and not values["evaluation.slides.path"]:
        yield Finding(
            f"evaluation.best_checkpoint is {wanted}, which needs slides: name them with "
            "evaluation.slides.path, labels and target, or choose by rankme"
        )
    if wanted.startswith("knn_") and not values["evaluation.val_dataset_path"]:
        yield Finding(
            f"evaluation.best_checkpoint is {wanted}, which needs labelled images: name them with "
            "evaluation.train_dataset_path and evaluation.val_dataset_path, or choose by rankme"
        )
    if early and wanted == "none":
        yield Finding(
            "evaluation.early_stop is true but evaluation.best_checkpoint is none, so nothing tells when to "
            "stop: name a signal, or auto"
        )
    if early and _monitor_period(values) <= 0:
        yield Finding(
            f"evaluation.early_stop is true but nothing is evaluated in the loop (evaluation.monitor_period "
            f"{values['evaluation.monitor_period']}): set a period"
        )


def dead_keys(values: Values) -> Iterator[Finding]:
    for key, instead in DEAD_KEYS.items():
        if key in values and values[key] not in (KEYS[key].default, None):
            yield warn(f"{key} {values[key]} has no effect: {instead}")


CHECKS: tuple[Callable[[Values], Iterator[Finding]], ...] = (
    architecture,
    crop_sizes,
    ordered_pairs,
    crop_scales,
    crop_colours,
    run_length,
    losses,
    accumulation,
    ibot_head,
    learning_rate,
    weight_sources,
    frozen_parts,
    continuing,
    labelled_images,
    labelled_slides,
    best_iteration,
    dead_keys,
)


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)
