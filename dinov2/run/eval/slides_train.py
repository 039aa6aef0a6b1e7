"""Submit the training and scoring of patients on bags, with its options and those of the submission."""

import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__" and not __package__:
    # Started as a file: Python searches the folder of the file, where that of the package is wanted.
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from dinov2 import cli
from dinov2.errors import ConfigError
from dinov2.run import submit


class SlideTrainer(submit.Task):
    """The job that trains on bags, in one process."""

    module = "dinov2.eval.slides.train"

    def check(self) -> Sequence[str]:
        """Refuse a job of several processes.

        Raises:
            ConfigError: it would have several.
        """
        if self.args.nodes * max(self.args.ngpus, 1) > 1:
            raise ConfigError(
                f"training on slides takes one process, and the job has {self.args.nodes} x "
                f"{self.args.ngpus}: give --nodes 1 and --ngpus 1, or --ngpus 0 for the CPU"
            )
        return ()


def main() -> None:
    """Parse the training's and the submission's options, submit."""
    from dinov2.eval.slides.train import get_args_parser

    submit.main(SlideTrainer, [get_args_parser(add_help=False)], name="dinov2:slides_train")


if __name__ == "__main__":
    cli.run(main)
