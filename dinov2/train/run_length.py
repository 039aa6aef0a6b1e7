"""How long a run is: epochs of a fixed number of iterations (DINOv2's way), iterations, images or passes."""

import math

from omegaconf import DictConfig

from dinov2.configs.scaling import images_per_iteration
from dinov2.errors import ConfigError


def total_iterations(cfg: DictConfig) -> int:
    """Return the number of optimizer steps; ``optim.max_images`` and ``max_passes`` must be settled."""
    maximum = cfg.optim.get("max_iterations")
    return maximum if maximum is not None else cfg.optim.epochs * cfg.train.OFFICIAL_EPOCH_LENGTH


def settle_run_length(cfg: DictConfig, dataset_length: int, world_size: int) -> None:
    """Turn ``optim.max_images`` or ``optim.max_passes`` into ``optim.max_iterations``, in place.

    Args:
        cfg: resolved config.
        dataset_length: tiles in the training set.
        world_size: number of processes.

    Raises:
        ConfigError: if the warm-up or the freezing of the last layer does not fit into the run, or the
            backbone is frozen to its end.
    """
    total_batch = images_per_iteration(cfg, world_size)
    images = cfg.optim.max_images
    if cfg.optim.max_passes is not None:
        images = cfg.optim.max_passes * dataset_length
    if images is not None:
        cfg.optim.max_iterations = max(1, math.ceil(images / total_batch))
        cfg.optim.max_images = cfg.optim.max_passes = None
    for key, what in (
        ("warmup_epochs", "warm-up"),
        ("freeze_last_layer_epochs", "freezing of the last layer"),
    ):
        iterations = cfg.optim[key] * cfg.train.OFFICIAL_EPOCH_LENGTH
        if iterations > total_iterations(cfg):
            raise ConfigError(
                f"The {what} of {iterations} iterations (optim.{key} {cfg.optim[key]} x "
                f"train.OFFICIAL_EPOCH_LENGTH {cfg.train.OFFICIAL_EPOCH_LENGTH}) is longer than the run of "
                f"{total_iterations(cfg)} iterations; lower optim.{key} or lengthen the run."
            )
    frozen = cfg.train.freeze_backbone_iterations
    if frozen >= total_iterations(cfg):
        raise ConfigError(
            f"train.freeze_backbone_iterations {frozen} is not shorter than the run of "
            f"{total_iterations(cfg)} iterations, so the backbone would never learn; lower it or lengthen "
            "the run."
        )


def describe_run_length(cfg: DictConfig, dataset_length: int, world_size: int) -> str:
    """Say in plain words how many images and how many real passes over the dataset the run makes."""
    iterations = total_iterations(cfg)
    total_batch = images_per_iteration(cfg, world_size)
    images = iterations * total_batch
    epochs = iterations / cfg.train.OFFICIAL_EPOCH_LENGTH
    return (
        f"run length: {iterations:,} iterations of {total_batch:,} images = {images:,} images = "
        f"{images / dataset_length:.3g} passes over {dataset_length:,} tiles "
        f"({epochs:.4g} epochs of {cfg.train.OFFICIAL_EPOCH_LENGTH:,} iterations)"
    )
