"""Evaluates a tiny network in the loop in any number of processes, in several ways, one after the other.

Usage: monitoring_worker.py CONFIG.yaml CASES.json OUTPUT_FOLDER

CASES.json: name -> {"overrides": [...], "steps": number, "evaluate": bool}. A case takes half of its steps,
is evaluated as after that many, and takes the other half. The first process writes ``<name>.pt``: the lines
of the records, the losses, and the whole state.
"""

import json
import sys
from pathlib import Path

import torch
from omegaconf import OmegaConf

from dinov2 import distributed
from dinov2.fsdp.state import gather
from dinov2.train.monitoring.images import open_sources
from dinov2.train.monitoring.monitor import Monitor
from dinov2.train.optimizer import build_optimizer
from dinov2.train.schedules import build_schedulers
from dinov2.train.step import train_step
from tests.train.parallel_worker import make_batch
from tests.train.sharding_worker import build

TEMPERATURE = 0.05


def run_case(cfg, name, case, folder):
    cfg = OmegaConf.merge(cfg, OmegaConf.from_dotlist(case["overrides"]))
    cfg.train.output_dir = str(folder / name)
    Path(cfg.train.output_dir).mkdir(exist_ok=True)
    distributed.barrier()
    model = build(cfg)
    monitor = Monitor(cfg, model, open_sources(cfg)) if case["evaluate"] else None
    if monitor:
        monitor.begin(0, continues=False, teacher_temp=TEMPERATURE)
    optimizer, schedules, losses = build_optimizer(cfg, model.get_params_groups()), build_schedulers(cfg), []
    for step in range(case["steps"]):
        if monitor and 2 * step == case["steps"]:
            monitor.evaluate(step, TEMPERATURE)
        result = train_step(model, optimizer, make_batch(cfg, step), schedules.at(step), cfg.optim.clip_grad)
        losses.append(result.losses)
    model.finish_center_updates()
    state = gather(dict(model.state_dict()), name)
    if distributed.is_main_process():
        lines = [record.line() for record in monitor.records] if monitor else []
        torch.save({"records": lines, "losses": losses, "state": state}, folder / f"{name}.pt")


def main(config_file: str, cases_file: str, output: str) -> None:
    distributed.enable(device="cpu", overwrite=True)
    for name, case in json.loads(Path(cases_file).read_text()).items():
        run_case(OmegaConf.load(config_file), name, case, Path(output))


if __name__ == "__main__":
    main(*sys.argv[1:])
