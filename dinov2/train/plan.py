"""What a run will need, before it starts: memory, speed, disk and the largest batch that fits.

    python -m dinov2.train.plan --config-file FILE --gpus 4 --gpu-mem 80 [key=value ...]

No GPU is used and no weights are read, but for the sizes that ``student.arch=auto`` takes from them. All
numbers are calculated, see docs/planning.md.
"""

import sys

if __name__ == "__main__":
    # As for the trainer itself: a wrong config is reported before torch is loaded.
    from dinov2 import cli
    from dinov2.train.arguments import check_command_line, get_plan_parser

    cli.run(check_command_line, sys.argv[1:], get_plan_parser())

import argparse
import json

from omegaconf import DictConfig

from dinov2 import cli
from dinov2.configs import resolve_config
from dinov2.errors import ConfigError
from dinov2.train.arguments import get_plan_parser
from dinov2.train.initialization import settle_config
from dinov2.train.planning.communication import scaling_table
from dinov2.train.planning.flops import step_flops
from dinov2.train.planning.hardware import FABRICS, PEAK_TFLOPS, peak_tflops
from dinov2.train.planning.memory import PartLayout
from dinov2.train.planning.parameters import build_networks
from dinov2.train.planning.report import Machine, Plan, as_json, as_text, make_plan, network_sizes
from dinov2.train.planning.workload import Workload
from dinov2.train.precision import DTYPES
from dinov2.utils.config import get_cfg_from_args

# DINOv2's recipe for patches of 14 pixels, whose local crops have 98: the rows of the scaling table.
SCALING_MODELS = {"ViT-S/14": "vit_small", "ViT-L/14": "vit_large", "ViT-g/14": "vit_giant2"}
SCALING_BATCH = 64


def main(args: argparse.Namespace) -> None:
    """Print the plan, or the table, that the parsed command line asks for."""
    if args.scaling_table:
        cli.say("\n".join(all_scaling_tables(args.gpu, args.mfu)))
        return
    args.output_dir = ""
    cfg = get_cfg_from_args(args)
    settle_config(cfg)
    plan = plan_of(args, cfg)
    cli.say(json.dumps(as_json(plan), indent=1) if args.json else as_text(plan))


def plan_of(args: argparse.Namespace, cfg: DictConfig) -> Plan:
    """Calculate the run of a resolved config on the GPUs that the options state.

    Raises:
        ConfigError: an option is out of range, or something does not go together.
    """
    for option, value in (("--gpus", args.gpus), ("--gpus-per-node", args.gpus_per_node)):
        _require(value >= 1, f"{option} is {value}; use at least 1")
    _require(args.gpu_mem > 0, f"--gpu-mem is {args.gpu_mem:g}; state the GiB of one GPU, such as 80")
    _require(0 < args.mfu <= 1, f"--mfu is {args.mfu:g}; use a share of the peak above 0 and at most 1")
    for option, value in (("--tiles", args.tiles), ("--total-batch", args.total_batch)):
        _require(value is None or value >= 1, f"{option} is {value}; use at least 1")
    _require(
        args.gpus <= args.gpus_per_node or args.gpus % args.gpus_per_node == 0,
        f"--gpus {args.gpus} is no multiple of --gpus-per-node {args.gpus_per_node}; use whole machines",
    )
    _require(
        args.fabric in FABRICS, f'--fabric "{args.fabric}" is not known; use one of {", ".join(FABRICS)}'
    )
    _require(
        args.peak_tflops is None or args.peak_tflops > 0,
        f"--peak-tflops is {args.peak_tflops}; use a number above 0",
    )
    format_name = cfg.compute_precision.student.backbone.mixed_precision.param_dtype
    tflops = args.peak_tflops or peak_tflops(args.gpu, DTYPES[format_name].itemsize)
    machine = Machine(args.gpus, args.gpus_per_node, args.gpu_mem, tflops, args.mfu, args.fabric)
    return make_plan(cfg, machine, tiles=args.tiles, total_batch=args.total_batch)


def _require(right: bool, problem: str) -> None:
    if not right:
        raise ConfigError(problem)


def all_scaling_tables(gpu: str, mfu: float) -> list[str]:
    """Return the tables of docs/scaling.md, in Markdown.

    Args:
        gpu: a key of PEAK_TFLOPS.
        mfu: share of its peak that is reached.
    """
    tflops = peak_tflops(gpu, 2)
    models = []
    for name, arch in SCALING_MODELS.items():
        words = [f"student.arch={arch}", "student.patch_size=14", "crops.local_crops_size=98"]
        words += ["train.centering=sinkhorn_knopp", "ibot.separate_head=true"]
        words += ["student.ffn_layer=swiglufused"] if arch == "vit_giant2" else []
        cfg = resolve_config("", words)
        networks = build_networks(cfg)
        work = Workload.of(cfg, networks.backbone, batch=SCALING_BATCH, mask_token_learns=True)
        seconds = SCALING_BATCH * step_flops(work).executed / (1e12 * tflops * mfu)
        held = PartLayout("FULL_SHARD", 1, compute=2, reduce=4)
        models.append((name, network_sizes(networks, held), work, seconds))
    lines = []
    for fabric in FABRICS:
        lines += [f"Fabric `{fabric}`, {gpu} at {100 * mfu:g} % of {PEAK_TFLOPS[gpu][0]:g} TFLOP/s:", ""]
        lines += [*scaling_table(models, fabric_name=fabric), ""]
    return lines[:-1]


if __name__ == "__main__":
    cli.run(main, get_plan_parser().parse_args())
