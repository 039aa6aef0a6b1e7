"""Trains a tiny model for a few steps on this rank's share of fixed global batches, in any process.

Usage: parallel_worker.py CONFIG.yaml OUTPUT.pt
"""

import sys
from pathlib import Path

import torch
from omegaconf import OmegaConf

from dinov2 import distributed
from dinov2.train.freezing import BackboneStart
from dinov2.train.optimizer import build_optimizer
from dinov2.train.schedules import build_schedulers
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.train.step import StepResult, train_step
from dinov2.utils.seeding import seed_everything

GLOBAL_BATCH = 4  # images over all ranks
MASKED_PER_CROP = 3
NUM_STEPS = 5


def rank_rows(crops: torch.Tensor, num_views: int) -> torch.Tensor:
    """Take this rank's images out of crop-major rows of the global batch."""
    by_view = crops.unflatten(0, (num_views, GLOBAL_BATCH))
    share = by_view.chunk(distributed.get_global_size(), dim=1)[distributed.get_global_rank()]
    return share.flatten(0, 1)


def make_batch(cfg, step: int) -> dict:
    """A batch that is the same however many ranks share it; every crop has the same number of masks."""
    generator = torch.Generator().manual_seed(step)
    size, small = cfg.crops.global_crops_size, cfg.crops.local_crops_size
    num_patches = (size // cfg.student.patch_size) ** 2
    num_local = cfg.crops.local_crops_number
    global_crops = torch.randn(2 * GLOBAL_BATCH, 3, size, size, generator=generator)
    local_crops = torch.randn(num_local * GLOBAL_BATCH, 3, small, small, generator=generator)
    masks = torch.zeros(2 * GLOBAL_BATCH, num_patches, dtype=torch.bool)
    order = torch.rand(masks.shape, generator=generator).argsort(dim=1)
    masks.scatter_(1, order[:, :MASKED_PER_CROP], True)
    masks = rank_rows(masks, 2)
    indices = masks.flatten().nonzero().flatten()
    return {
        "collated_global_crops": rank_rows(global_crops, 2),
        "collated_local_crops": rank_rows(local_crops, num_local),
        "collated_masks": masks,
        "mask_indices_list": indices,
        "masks_weight": torch.full((len(indices),), 1.0 / MASKED_PER_CROP),
        "n_masked_patches": torch.tensor([len(indices)]),
        "upperbound": len(indices),
    }


def take_steps(cfg, model: SSLMetaArch, steps: int) -> tuple[torch.optim.Optimizer, list[StepResult]]:
    """Train a prepared model on the fixed batches."""
    optimizer = build_optimizer(cfg, model.get_params_groups())
    schedules, start = build_schedulers(cfg), BackboneStart(model.cfg, model.student["backbone"])
    results = [
        train_step(
            model,
            optimizer,
            make_batch(cfg, step),
            start.enter(step, schedules.at(step)),
            cfg.optim.clip_grad,
        )
        for step in range(steps)
    ]
    model.finish_center_updates()
    return optimizer, results


def main(config_file: str, output: str) -> None:
    distributed.enable(device="cpu", overwrite=True)
    cfg = OmegaConf.load(config_file)
    # Differing seeds on purpose: preparing for training must make the ranks equal.
    seed_everything(7, distributed.get_global_rank())
    model = SSLMetaArch(cfg)
    model.prepare_for_distributed_training()
    _, results = take_steps(cfg, model.train(), NUM_STEPS)
    if distributed.is_main_process():
        content = {
            "losses": [result.losses for result in results],
            "grad_norms": [result.grad_norms for result in results],
            "state": model.state_dict(),
        }
        torch.save(content, Path(output))


if __name__ == "__main__":
    main(*sys.argv[1:])
