"""Submit a training: ``python dinov2/run/train/train.py --nodes 4 --config-file ... key=value``."""

import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__" and not __package__:
    # Started as a file: Python searches the folder of the file, where that of the package is wanted.
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from dinov2 import cli
from dinov2.run import submit


class Trainer(submit.Task):
    """The job that trains."""

    module = "dinov2.train"
    knows_restarts = True  # dinov2.train.start_anew

    def check(self) -> Sequence[str]:
        """See :func:`dinov2.run.submit.check_config`."""
        return submit.check_config(self.args)


def main() -> None:
    """Parse the trainer's and the submission's options, submit."""
    from dinov2.train import get_args_parser

    submit.main(Trainer, [get_args_parser(add_help=False)], name="dinov2:train")


if __name__ == "__main__":
    cli.run(main)
