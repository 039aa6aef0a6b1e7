"""Write one static page on a run, or on several: ``python -m dinov2.eval.compare RUN [RUN ...]``.

A RUN is the output folder of a training or of an evaluation. The page needs no network, no other files and no
scripts; docs/evaluation.md says what it shows.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from dinov2 import cli
from dinov2.errors import ConfigError, counted
from dinov2.eval.report.collect import collect, describe, require_same_classes
from dinov2.eval.report.page import build, write, write_data

REPORT = "report.html"


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the report."""
    parser = argparse.ArgumentParser(description="Write a report of one run, or of several side by side")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="Output folder of a training or an evaluation")
    parser.add_argument(
        "--output", help=f"The page (default: RUN/{REPORT} of one run, {REPORT} here of several)"
    )
    parser.add_argument(
        "--names", nargs="+", metavar="NAME", help="What to call the runs (default: their folders)"
    )
    parser.add_argument("--data", metavar="DIR", help="Write the numbers behind the charts as CSV files, too")
    return parser


def main(args: argparse.Namespace) -> None:
    """Read the runs and write the page."""
    names = _names(args.runs, args.names)
    runs = [collect(folder, name) for folder, name in zip(args.runs, names, strict=True)]
    require_same_classes(runs)
    path = Path(args.output or (Path(args.runs[0]) / REPORT if len(runs) == 1 else REPORT))
    write(path, build(runs))
    cli.say(f"{path} shows {describe(runs)}")
    if args.data:
        written = write_data(Path(args.data), runs)
        cli.say(f"the numbers are in {args.data}: {', '.join(written)}")


def _names(folders: Sequence[str], given: Sequence[str] | None) -> list[str]:
    """Return a name for each run; folders of equal names keep their whole path.

    Raises:
        ConfigError: Another number of names was given, or one twice.
    """
    if given is None:
        short = [Path(folder).resolve().name for folder in folders]
        times = Counter(short)
        given = [
            name if times[name] == 1 else str(folder) for name, folder in zip(short, folders, strict=True)
        ]
    if len(given) != len(folders):
        raise ConfigError(
            f"{counted(len(folders), 'run')} and {counted(len(given), 'name')} are given: --names takes one "
            "name per run"
        )
    twice = [name for name, times in Counter(given).items() if times > 1]
    if twice:
        raise ConfigError(f'two runs are called "{twice[0]}": give each RUN once, and --names that differ')
    return list(given)


if __name__ == "__main__":
    cli.run(main, get_args_parser().parse_args(sys.argv[1:]))
