"""Submit the extraction of slides, with its options and those of the submission."""

import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__" and not __package__:
    # Started as a file: Python searches the folder of the file, where that of the package is wanted.
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from dinov2 import cli
from dinov2.run import submit


class SlideExtractor(submit.Task):
    """The job that extracts the slides, shared out over its processes; one that is queued again goes on."""

    module = "dinov2.eval.slides.extract"

    def check(self) -> Sequence[str]:
        """See :func:`dinov2.run.submit.check_config`."""
        return submit.check_config(self.args)


def main() -> None:
    """Parse the extraction's and the submission's options, submit."""
    from dinov2.eval.slides.extract import get_args_parser

    submit.main(SlideExtractor, [get_args_parser(add_help=False)], name="dinov2:slides_extract")


if __name__ == "__main__":
    cli.run(main)
