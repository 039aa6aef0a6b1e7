"""Submit a logistic-regression evaluation, with its options and those of the submission."""

from dinov2 import cli
from dinov2.run import submit


class Evaluator(submit.Task):
    """The job that evaluates."""

    module = "dinov2.eval.log_regression"


def main() -> None:
    """Parse the evaluation's and the submission's options, submit."""
    from dinov2.eval.log_regression import get_args_parser

    submit.main(Evaluator, [get_args_parser(add_help=False)], name="dinov2:logreg")


if __name__ == "__main__":
    cli.run(main)
