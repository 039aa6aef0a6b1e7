"""Options that several evaluations share."""

import argparse
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from dinov2.eval.metrics import MetricType
from dinov2.eval.setup import get_args_parser as get_setup_args_parser


def make_parser(
    description: str,
    parents: Sequence[argparse.ArgumentParser] | None,
    add_help: bool,
) -> argparse.ArgumentParser:
    """Return a parser of the options of :mod:`dinov2.eval.setup` and of the two datasets."""
    setup_parser = get_setup_args_parser(parents=list(parents or []), add_help=False)
    parser = argparse.ArgumentParser(description=description, parents=[setup_parser], add_help=add_help)
    parser.add_argument(
        "--train-dataset",
        dest="train_dataset_str",
        type=str,
        default="ImageNet:split=TRAIN",
        help="Training dataset, such as ImageFolder:root=FOLDER (default: %(default)s)",
    )
    parser.add_argument(
        "--val-dataset",
        dest="val_dataset_str",
        type=str,
        default="ImageNet:split=VAL",
        help="Validation dataset (default: %(default)s)",
    )
    return parser


def add_metric_option(
    parser: argparse.ArgumentParser,
    flag: str,
    default: MetricType | None,
    help: str,
    nargs: str | None = None,
) -> None:
    """Add an option that takes the value of a :class:`~dinov2.eval.metrics.MetricType`."""
    names = ", ".join(metric.value for metric in MetricType)
    parser.add_argument(
        flag, type=MetricType, default=default, nargs=nargs, metavar="METRIC", help=f"{help}: {names}"
    )


def options_for(function: Callable, args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of a command line that are parameters of ``function``, by name."""
    parameters = inspect.signature(function).parameters
    return {name: value for name, value in vars(args).items() if name in parameters}
