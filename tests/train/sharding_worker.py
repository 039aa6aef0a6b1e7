"""Trains one tiny model in several ways, one after the other, and says what came out; run by torchrun.

Usage: sharding_worker.py CONFIG.yaml CASES.json OUTPUT_FOLDER [cpu | cuda]

CASES.json: name -> {"overrides": ["key=value", ...], "steps": number}. Every process writes
``<name>.<rank>.json``, the first one also ``<name>.pt`` with whole tensors and an export ``<name>/eval/run``.
"""

import json
import sys
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch.nn.parallel import DistributedDataParallel

from dinov2 import distributed
from dinov2.fsdp import get_fsdp_modules, reshard_fsdp_model
from dinov2.fsdp.sharding import local_part, whole_tensor
from dinov2.fsdp.state import gather
from dinov2.train.run_state import do_test
from dinov2.train.sharding import shard_networks
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.utils.device import resolve_device
from dinov2.utils.seeding import seed_everything
from tests.train.parallel_worker import make_batch, take_steps


def build(cfg, device="cpu"):
    # Differing seeds on purpose: preparing for training must make the ranks equal.
    seed_everything(7, distributed.get_global_rank())
    model = SSLMetaArch(cfg).to(resolve_device(device))
    model.prepare_for_distributed_training()
    if distributed.is_enabled() and distributed.get_global_size() == 1:
        # A run of one process shards nothing; here it stands for many, where there is one GPU.
        shard_networks(model.student, model.teacher, model.precision, model.cfg.compute_precision)
    return model.train()


def train(cfg, steps, device="cpu"):
    """Take some steps; return the model, its optimizer, and what this process saw."""
    model = build(cfg, device)
    optimizer, results = take_steps(cfg, model, steps)
    gradients = {name: part_gradient_norm(part) for name, part in model.student.items()}
    moments = [state["exp_avg"] for state in optimizer.state.values()]
    facts = {
        "losses": [result.losses for result in results],
        "grad_norms": [result.grad_norms for result in results],
        "clipped": gradients,
        "parameters": held(model.parameters()),
        "moments": held(moments),
        "units": {
            f"{network}.{name}": len(get_fsdp_modules(part))
            for network in ("student", "teacher")
            for name, part in getattr(model, network).items()
        },
    }
    return model, optimizer, facts


def held(tensors):
    """(elements this process holds, all elements)"""
    tensors = list(tensors)
    return sum(local_part(tensor).numel() for tensor in tensors), sum(tensor.numel() for tensor in tensors)


def part_gradient_norm(part):
    whole = [whole_tensor(p.grad).float() for p in part.parameters() if p.grad is not None]
    return torch.stack([gradient.norm() for gradient in whole]).norm().item() if whole else 0.0


def difference_from_ddp(cfg):
    """The largest relative difference between our gradients of one step and those of PyTorch's DDP."""
    found = []
    for ours in (True, False):
        section = OmegaConf.create({"compute_precision": cfg.compute_precision})
        if not ours:
            for part in section.compute_precision.student.values():
                part.sharding_strategy = "NO_SHARD"
        model = build(OmegaConf.merge(cfg, section))
        if not ours:
            for name in list(model.student):
                model.student[name] = DistributedDataParallel(model.student[name])
        model.backprop_loss(model.compute_losses(make_batch(cfg, 0), 0.05).total)
        reshard_fsdp_model(model)
        named = model.student.named_parameters()
        found.append({name.replace("module.", ""): whole_tensor(p.grad) for name, p in named})
    ours, theirs = found
    assert ours.keys() == theirs.keys()
    return max(float((ours[n] - theirs[n]).norm() / theirs[n].norm().clamp_min(1e-6)) for n in theirs)


def run_case(cfg, name, case, folder, device):
    cfg = OmegaConf.merge(cfg, OmegaConf.from_dotlist(case["overrides"]))
    model, _, facts = train(cfg, case["steps"], device)
    cfg.train.output_dir = str(folder / name)
    do_test(cfg, model, "run")
    if case.get("ddp"):
        facts["difference_from_ddp"] = difference_from_ddp(cfg)
    state = gather(dict(model.state_dict()), name)
    if distributed.is_main_process():
        torch.save(state, folder / f"{name}.pt")
    (folder / f"{name}.{distributed.get_global_rank()}.json").write_text(json.dumps(facts))


def main(config_file: str, cases_file: str, output: str, device: str = "cpu") -> None:
    distributed.enable(overwrite=True, device=device)
    for name, case in json.loads(Path(cases_file).read_text()).items():
        run_case(OmegaConf.load(config_file), name, case, Path(output), device)


if __name__ == "__main__":
    main(*sys.argv[1:])
