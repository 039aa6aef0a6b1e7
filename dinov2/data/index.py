"""Builds the index of a tile tree: ``python -m dinov2.data.index --root DIR --extra DIR [--sshid ID]``."""

import argparse
import logging

from dinov2 import cli
from dinov2.data.datasets import Pathology


def main(arguments: list[str] | None = None) -> None:
    """List the tiles below the folders in ``root/entry.csv`` and write their index into ``extra``."""
    parser = argparse.ArgumentParser(prog="python -m dinov2.data.index", description=main.__doc__)
    parser.add_argument("--root", required=True, help="folder of entry.csv")
    parser.add_argument("--extra", required=True, help="folder to write the index into")
    parser.add_argument("--split", default="TRAIN", help="split to index (default: %(default)s)")
    parser.add_argument("--sshid", default="", help="path rewriting of the forks: 11 or 448")
    parser.add_argument("--path-map", default="", help="path rewriting: /old=/new,/other=/elsewhere")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    Pathology(
        split=args.split, root=args.root, extra=args.extra, sshid=args.sshid, path_map=args.path_map
    ).dump_extra()


if __name__ == "__main__":
    cli.run(main)
