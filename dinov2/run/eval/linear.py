"""Submit a linear-probe evaluation, with its options and those of the submission."""

from dinov2 import cli
from dinov2.run import submit


class Evaluator(submit.Task):
    """The job that evaluates."""

    module = "dinov2.eval.linear"


def main() -> None:
    """Parse the evaluation's and the submission's options, submit."""
    from dinov2.eval.linear import get_args_parser

    submit.main(Evaluator, [get_args_parser(add_help=False)], name="dinov2:linear")


if __name__ == "__main__":
    cli.run(main)
