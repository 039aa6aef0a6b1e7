"""Whether a run may be continued with a config: what decides its result must be what it was.

Every key of the schema is named here once, in MATTERS or in FREE; ``section.*`` names all below a section.
"""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dinov2.configs.schema import KEYS
from dinov2.errors import ConfigError

logger = logging.getLogger("dinov2")

# Decide the weights that come out.
MATTERS = (
    "MODEL.WEIGHTS",
    "compute_precision.grad_scaler",
    *(
        f"compute_precision.{network}.{part}.mixed_precision.*"
        for network in ("teacher", "student")
        for part in ("backbone", "dino_head", "ibot_head")
    ),
    "dino.*",
    "ibot.*",
    "train.batch_size_per_gpu",
    "train.dataset_path",
    "train.seed",
    "train.OFFICIAL_EPOCH_LENGTH",
    "train.centering",
    "train.init_weights_from_chkpt",
    "train.sampler_type",
    "train.freeze_backbone_iterations",
    "train.freeze_blocks",
    "student.*",
    "teacher.*",
    "optim.epochs",
    "optim.weight_decay",
    "optim.weight_decay_end",
    "optim.base_lr",
    "optim.warmup_epochs",
    "optim.min_lr",
    "optim.clip_grad",
    "optim.freeze_last_layer_epochs",
    "optim.scaling_rule",
    "optim.patch_embed_lr_mult",
    "optim.layerwise_decay",
    "optim.adamw_beta1",
    "optim.adamw_beta2",
    "optim.max_iterations",
    "optim.max_images",
    "optim.max_passes",
    "optim.backbone_lr_mult",
    "optim.start_iter",
    "crops.*",
    "head.*",
)

# Decide how fast, where and how safely the same is computed, or nothing. The number of processes and
# optim.accumulate_steps count as their product, see require_same_config; optim.lr follows from other keys,
# unless optim.scaling_rule is none: then it is compared, too.
FREE = (
    "compute_precision.hybrid_shard_size",
    *(
        f"compute_precision.{network}.{part}.sharding_strategy"
        for network in ("teacher", "student")
        for part in ("backbone", "dino_head", "ibot_head")
    ),
    "train.path_map",
    "train.output_dir",
    "train.saveckp_freq",
    "train.num_workers",
    "train.max_bad_fraction",
    "train.worker_timeout",
    "train.prefetch_factor",
    "train.worker_start_method",
    "train.cache_dataset",
    "train.device",
    "train.log_period",
    "train.sshid",
    "train.activation_checkpointing",
    "train.compile",
    "train.cuda_graphs",
    "train.max_bad_steps",
    "train.process_timeout",
    "train.self_check",
    "optim.lr",
    "optim.accumulate_steps",
    "evaluation.*",
    "checkpointing.*",
    "tracking.*",
)


def matches(key: str, patterns: tuple[str, ...]) -> list[str]:
    """Return the patterns that name a key."""
    return [
        pattern
        for pattern in patterns
        if key == pattern or (pattern.endswith(".*") and key.startswith(pattern[:-1]))
    ]


def settings_of(cfg: DictConfig, world_size: int) -> dict[str, Any]:
    """Return what a checkpoint keeps of a config, as plain values for :func:`require_same_config`."""
    return {"config": OmegaConf.to_container(cfg, resolve=True), "processes": world_size}


def require_same_config(
    cfg: DictConfig, world_size: int, stored: Mapping[str, Any], *, anyway: bool = False
) -> None:
    """Compare the config with that of the run that is to be continued.

    Args:
        cfg: resolved, its learning rate and run length settled.
        world_size: number of processes.
        stored: what the checkpoint holds; one without a config is let through with a warning.
        anyway: warn instead of refusing.

    Raises:
        ConfigError: they differ in something that decides the result; all such keys are named.
    """
    if "config" not in stored:
        logger.warning("the checkpoint does not tell its config: it is taken to be that of this run")
        return
    differences = [*_differing_keys(cfg, stored["config"]), *_differing_batch(cfg, world_size, stored)]
    if not differences:
        return
    listed = "".join(f"\n  {number}. {text}" for number, text in enumerate(differences, 1))
    if anyway:
        logger.warning("the run goes on with another config, its result is that of neither:%s", listed)
        return
    raise ConfigError(
        "the checkpoint in the output directory was made with another config, in what decides the result: "
        "start the run with its old values, or in another --output-dir, or go on all the same with "
        f"--resume-anyway:{listed}"
    )


def _differing_keys(cfg: DictConfig, stored: Mapping[str, Any]) -> Iterator[str]:
    present = OmegaConf.to_container(cfg, resolve=True)
    # Where the rules differ, that is told instead.
    rules = {_lookup(values, "optim.scaling_rule", "") for values in (stored, present)}
    for path, key in KEYS.items():
        if not (matches(path, MATTERS) or (path == "optim.lr" and rules == {"none"})):
            continue
        # A key that the program did not have yet meant what is its default now.
        before, now = (_plain(_lookup(values, path, key.default)) for values in (stored, present))
        if before != now:
            yield f"{path} was {before!r} and is {now!r}"


def _differing_batch(cfg: DictConfig, world_size: int, stored: Mapping[str, Any]) -> Iterator[str]:
    """Compare the images of an optimizer step, which processes and accumulation make together."""
    before_steps = _lookup(stored["config"], "optim.accumulate_steps", 1)
    before = before_steps * stored["processes"]
    if before == cfg.optim.accumulate_steps * world_size:
        return
    text = (
        f"an iteration was {before_steps} x {stored['processes']} batches (optim.accumulate_steps x "
        f"processes) and is {cfg.optim.accumulate_steps} x {world_size}"
    )
    before_lr = _lookup(stored["config"], "optim.lr", cfg.optim.lr)
    if before_lr != cfg.optim.lr:
        text += f", so that optim.lr was {before_lr:g} and is {cfg.optim.lr:g}"
    if before % world_size == 0:
        text += f"; optim.accumulate_steps={before // world_size} keeps both as they were"
    yield text


def _lookup(values: Any, path: str, default: Any) -> Any:
    for name in path.split("."):
        if not isinstance(values, Mapping) or name not in values:
            return default
        values = values[name]
    return values


def _plain(value: Any) -> Any:
    """Make a value comparable: tuples are lists, and no text is None where both mean nothing."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if value == "" else value
