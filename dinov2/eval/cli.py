"""Options that several evaluations share."""

import argparse
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from dinov2.errors import ConfigError
from dinov2.eval.metrics import MetricType
from dinov2.eval.scores import DRAWS
from dinov2.eval.setup import get_args_parser as get_setup_args_parser


def make_model_parser(
    description: str,
    parents: Sequence[argparse.ArgumentParser] | None,
    add_help: bool,
) -> argparse.ArgumentParser:
    """Return a parser of the options of :mod:`dinov2.eval.setup`."""
    setup_parser = get_setup_args_parser(parents=list(parents or []), add_help=False)
    return argparse.ArgumentParser(description=description, parents=[setup_parser], add_help=add_help)


def make_parser(
    description: str,
    parents: Sequence[argparse.ArgumentParser] | None,
    add_help: bool,
) -> argparse.ArgumentParser:
    """Return a parser of the options of :mod:`dinov2.eval.setup` and of the two datasets."""
    parser = make_model_parser(description, parents, add_help)
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


class NotedAction(argparse.Action):
    """Stores a value and notes in ``given`` that the command line had it, whatever it is."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: Any = None) -> None:
        """Store the value, as argparse asks."""
        setattr(namespace, self.dest, values)
        namespace.given = [*namespace.given, self.dest]


def add_result_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the transform and of the summary, which all evaluations share."""
    parser.add_argument(
        "--resize-size",
        type=int,
        help="Shorter side of the images in pixels before the central 224 are taken: 256 as DINOv2's k-NN "
        "and linear evaluation, 224 for tiles of that size (default: the evaluation's)",
    )
    parser.add_argument(
        "--features",
        metavar="FOLDER",
        help="Folder with a feature store of each dataset, made by python -m dinov2.eval.extract (default: "
        "none, read the images)",
    )
    parser.add_argument(
        "--bootstrap-draws",
        type=int,
        default=DRAWS,
        help="Draws behind the 95 %% intervals of the summary, 0 for none (default: %(default)s)",
    )
    parser.add_argument(
        "--predictions",
        dest="save_predictions",
        action="store_true",
        help="Write the class scores of every image as CSV files",
    )
    parser.set_defaults(given=[])


def check_loading(what: str, batch_size: int, num_workers: int, resize_size: int | None = None) -> None:
    """Stop at unusable numbers for the loading of images.

    Args:
        what: The evaluation, for the message.
        batch_size, num_workers, resize_size: As given; no size is the default of the evaluation.

    Raises:
        ConfigError: One is too small.
    """
    for name, value, least in (
        ("--batch-size", batch_size, 1),
        ("--num-workers", num_workers, 0),
        ("--resize-size", resize_size, 1),
    ):
        if value is not None and value < least:
            raise ConfigError(f"{name} of {what} is {value}: give a whole number from {least} up")


def check_draws(draws: int) -> None:
    """Stop at an unusable number of bootstrap draws.

    Raises:
        ConfigError: It is negative.
    """
    if draws < 0:
        raise ConfigError(f"the number of bootstrap draws is {draws}: give 0 for no intervals, or about 1000")


def options_for(function: Callable, args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of a command line that are parameters of ``function``, by name."""
    parameters = inspect.signature(function).parameters
    return {name: value for name, value in vars(args).items() if name in parameters}
