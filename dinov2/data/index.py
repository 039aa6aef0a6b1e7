"""Builds the index of a tile tree: ``python -m dinov2.data.index --root DIR --extra DIR [--sshid ID]``."""

import argparse
import logging
from pathlib import Path

from dinov2 import cli
from dinov2.data.datasets.arrays import atomic_file
from dinov2.data.datasets.checks import existing_folder
from dinov2.data.indexing.verify import LEVELS
from dinov2.data.indexing.workers import default_workers
from dinov2.errors import ConfigError, some_of


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    parser = argparse.ArgumentParser(prog="python -m dinov2.data.index", description=main.__doc__)
    parser.add_argument("--root", help="folder of entry.csv (default: --extra)")
    parser.add_argument("--extra", required=True, help="folder to write the index into")
    parser.add_argument(
        "--patches", help="a patches folder; writes an entry.csv that names it, if there is none"
    )
    parser.add_argument("--split", default="TRAIN", help="split to index (default: %(default)s)")
    parser.add_argument("--sshid", default="", help="path map of the forks: 11 or 448")
    parser.add_argument(
        "--path-map", default="", help="where recorded folders lie here: /old=/new,/other=/elsewhere"
    )
    parser.add_argument(
        "--verify",
        choices=LEVELS,
        default="none",
        help="look at names only, open every image, or read all its pixels (default: %(default)s)",
    )
    parser.add_argument(
        "--workers", type=int, help=f"how many work at once; 0: one (default here: {default_workers()})"
    )
    parser.add_argument(
        "--fresh", action="store_true", help="list slides again whose folder has not changed, too"
    )
    return parser


def main(arguments: list[str] | None = None) -> None:
    """List the tiles below the folders in ``root/entry.csv`` and write their index into ``extra``.

    A build that was killed, or is repeated, lists only slides that it has not listed or that have changed.
    """
    args = get_args_parser().parse_args(arguments)
    from dinov2.data.datasets import Pathology  # loads torch, which takes seconds that --help can do without

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    root = args.root or args.extra
    if args.patches:
        name_patches_folder(root, args.patches)
    dataset = Pathology(
        split=args.split, root=root, extra=args.extra, sshid=args.sshid, path_map=args.path_map
    )
    report = dataset.dump_extra(workers=args.workers, verify=args.verify, fresh=args.fresh)
    cli.say(f"{args.extra}: {report.summary()}")


def name_patches_folder(root: str, patches: str) -> None:
    """Write ``root/entry.csv`` for one patches folder, unless it is there and says the same.

    Raises:
        ConfigError: the file is there and names other folders.
        DatasetError: the patches folder is missing.
        OutputError: the file can not be written.
    """
    from dinov2.data.datasets.pathology import CSV_COLUMN, read_entry_csv

    existing_folder(patches, dataset="the index builder", key="--patches")
    folder = str(Path(patches).absolute())
    path = Path(root, "entry.csv")
    if path.exists():
        named = read_entry_csv(path)
        if [entry.rstrip("/") for entry in named] != [folder]:
            raise ConfigError(
                f'--patches is "{folder}", but "{path}" names {some_of(named, 3)}: leave --patches out, '
                "or give another --root"
            )
        return
    with atomic_file(str(path)) as file:
        file.write(f"{CSV_COLUMN}\n{_quoted(folder)}\n".encode("utf-8", "surrogateescape"))


def _quoted(value: str) -> str:
    return '"' + value.replace('"', '""') + '"' if set(value) & set(',"\r\n') else value


if __name__ == "__main__":
    cli.run(main)
