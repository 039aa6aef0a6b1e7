"""Compare two models on the same images: ``python -m dinov2.eval.paired FIRST.csv SECOND.csv``.

The files are those that an evaluation writes with ``--predictions``. Printed is one JSON document of
:func:`dinov2.eval.scores.paired_bootstrap`: by score, both values, the gain of the second over the first, its
95 % interval and a p-value.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from dinov2 import cli
from dinov2.errors import DatasetError
from dinov2.eval.cli import check_draws
from dinov2.eval.predictions import read_predictions
from dinov2.eval.scores import DRAWS, paired_bootstrap
from dinov2.utils.strict_json import to_json


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the comparison."""
    parser = argparse.ArgumentParser(description="Compare the predictions of two models on the same images")
    parser.add_argument("first", help="CSV file of predictions")
    parser.add_argument("second", help="CSV file of predictions of the same images")
    parser.add_argument("--bootstrap-draws", type=int, default=DRAWS, help="Draws (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="Of the draws (default: %(default)s)")
    return parser


def compare_files(first_path: str | Path, second_path: str | Path, draws: int, seed: int) -> dict[str, Any]:
    """Return :func:`dinov2.eval.scores.paired_bootstrap` of two files of predictions.

    Raises:
        DatasetError: A file cannot be read, or the two are not of the same images.
    """
    (first, names), (second, other_names) = map(read_predictions, (first_path, second_path))
    if names != other_names:
        pairs = enumerate(zip(names, other_names, strict=False))
        different = (f'sample {i} is "{a}" and "{b}"' for i, (a, b) in pairs if a != b)
        shown = next(different, f"{len(names)} and {len(other_names)} samples")
        raise DatasetError(
            f'"{first_path}" and "{second_path}" are not of the same images ({shown}): compare two models on '
            "one dataset"
        )
    return paired_bootstrap(first, second, draws, seed)


def main(args: argparse.Namespace) -> None:
    """Compare and print."""
    check_draws(args.bootstrap_draws)
    cli.say(to_json(compare_files(args.first, args.second, args.bootstrap_draws, args.seed), indent=2))


if __name__ == "__main__":
    cli.run(main, get_args_parser().parse_args(sys.argv[1:]))
