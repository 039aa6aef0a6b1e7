"""Checks a tiny run on every process of a group, one of which may be spoiled; run by torchrun.

Usage: self_check_worker.py CONFIG.yaml OUTPUT_FOLDER FAULT...
"""

import json
import sys
from pathlib import Path

from omegaconf import OmegaConf

from dinov2 import distributed
from dinov2.errors import UserError
from dinov2.train.input import build_dataset
from dinov2.train.optimizer import build_optimizer
from dinov2.train.self_check import enforce, run_self_check
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.utils.config import apply_scaling_rules_to_cfg
from dinov2.utils.seeding import seed_everything


def spoil(fault: str, cfg, model, dataset) -> None:
    """Break something on the second process only."""
    if distributed.get_global_rank() != 1:
        return
    if fault == "masks":
        cfg.ibot.mask_sample_probability = 0.0
    elif fault == "teacher":
        model.teacher["backbone"].cls_token.data.add_(1.0)
    elif fault == "forward":
        model.student["backbone"].norm.forward = None
    elif fault == "tile":
        dataset.get_image_data = lambda index: b"no image"


def check_once(config_file: str, folder: Path, fault: str) -> None:
    cfg = OmegaConf.load(config_file)
    cfg.train.output_dir = str(folder)
    apply_scaling_rules_to_cfg(cfg)
    seed_everything(7, distributed.get_global_rank())
    model = SSLMetaArch(cfg)
    model.prepare_for_distributed_training()
    model.train()
    dataset = build_dataset(cfg)
    optimizer = build_optimizer(cfg, model.get_params_groups())
    spoil(fault, cfg, model, dataset)
    outcome = {"lines": [], "error": ""}
    try:
        check = run_self_check(
            cfg, model, optimizer, dataset, initial=model.initial_weights, start_iteration=0
        )
        outcome["lines"] = [[line.name, line.status, line.text] for line in check.lines]
        enforce(check, "stop")
    except UserError as error:
        outcome["error"] = str(error)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"outcome_{distributed.get_global_rank()}.json").write_text(json.dumps(outcome))


def main(config_file: str, folder: str, *faults: str) -> None:
    distributed.enable(overwrite=True, device="cpu")
    for fault in faults:
        check_once(config_file, Path(folder) / fault, fault)


if __name__ == "__main__":
    main(*sys.argv[1:])
