"""The trainer's command line. Imports nothing heavy: mistakes are reported before torch is loaded."""

import argparse
from collections.abc import Sequence

from dinov2.configs import resolve


def get_args_parser(add_help: bool = True) -> argparse.ArgumentParser:
    """Return the parser; ``opts`` takes every word from the first positional on."""
    parser = argparse.ArgumentParser(
        "DINOv2 training",
        description="Self-supervised training of a vision transformer on tiles.",
        add_help=add_help,
    )
    parser.add_argument("--config-file", default="", metavar="FILE", help="YAML with changes to the default")
    parser.add_argument(
        "--no-resume", action="store_true", help="start anew; checkpoints of before move to before_<n>/"
    )
    parser.add_argument(
        "--resume-anyway",
        action="store_true",
        help="continue a run although its config was another in what decides the result",
    )
    parser.add_argument("--eval-only", action="store_true", help="export the newest checkpoint and stop")
    parser.add_argument("--eval", type=str, default="", help="accepted for old scripts; has no effect")
    parser.add_argument("--show-crops", default="", metavar="FILE", help="draw the first crops and stop")
    parser.add_argument(
        "--output-dir", "--output_dir", default="", type=str, help="logs and checkpoints (default: here)"
    )
    parser.add_argument(
        "--lenient-config", action="store_true", help="warn about unknown config keys instead of stopping"
    )
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, help="config overrides, key=value; must come after all options"
    )
    return parser


def get_show_crops_parser() -> argparse.ArgumentParser:
    """Return the parser of ``python -m dinov2.train.show_crops``."""
    parser = argparse.ArgumentParser(
        "show_crops", description="Draw the crops with which a training begins, and their masks."
    )
    parser.add_argument("--config-file", default="", metavar="FILE", help="YAML with changes to the default")
    parser.add_argument("--output", default="crops.png", metavar="FILE", help="picture (default: crops.png)")
    parser.add_argument("--tiles", type=int, default=4, metavar="N", help="rows of the picture (default: 4)")
    parser.add_argument(
        "--iteration", type=int, default=0, metavar="N", help="whose first tiles to draw (default: 0)"
    )
    parser.add_argument(
        "--lenient-config", action="store_true", help="warn about unknown config keys instead of stopping"
    )
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, help="config overrides, key=value; must come after all options"
    )
    return parser


def get_plan_parser() -> argparse.ArgumentParser:
    """Return the parser of ``python -m dinov2.train.plan``."""
    parser = argparse.ArgumentParser(
        "plan", description="Calculate memory, speed, disk and the largest batch of a training."
    )
    parser.add_argument("--config-file", default="", metavar="FILE", help="YAML with changes to the default")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="of the run (default: 1)")
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="(default: 8)")
    parser.add_argument("--gpu-mem", type=float, default=80.0, metavar="GIB", help="of one GPU (default: 80)")
    parser.add_argument("--gpu", default="h100", metavar="NAME", help="whose peak to take (default: h100)")
    parser.add_argument("--peak-tflops", type=float, metavar="X", help="peak to take instead of --gpu's")
    parser.add_argument("--mfu", type=float, default=0.4, help="share of the peak reached (default: 0.4)")
    parser.add_argument(
        "--fabric",
        default="eight-cards",
        help="network of the machines: eight-cards (8 x 400 Gbit/s, default) or one-card (200 Gbit/s)",
    )
    parser.add_argument("--tiles", type=int, metavar="N", help="in the dataset, to count passes")
    parser.add_argument(
        "--total-batch", type=int, metavar="N", help="images per step to reach by accumulating"
    )
    parser.add_argument("--json", action="store_true", help="print all numbers as JSON")
    parser.add_argument("--scaling-table", action="store_true", help="print the tables of docs/scaling.md")
    parser.add_argument(
        "--lenient-config", action="store_true", help="warn about unknown config keys instead of stopping"
    )
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, help="config overrides, key=value; must come after all options"
    )
    return parser


def check_command_line(arguments: Sequence[str], parser: argparse.ArgumentParser | None = None) -> None:
    """Parse ``arguments`` and resolve the config they name; raises ConfigError for any mistake.

    Args:
        arguments: words of the command line.
        parser: by default the trainer's.
    """
    args = (parser or get_args_parser()).parse_args(arguments)
    output_dir = getattr(args, "output_dir", "")
    resolve(args.config_file, args.opts, output_dir=output_dir, lenient=args.lenient_config)
