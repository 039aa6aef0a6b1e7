"""Submit a k-NN evaluation, with its options and those of the submission."""

from dinov2 import cli
from dinov2.run import submit


class Evaluator(submit.Task):
    """The job that evaluates."""

    module = "dinov2.eval.knn"


def main() -> None:
    """Parse the evaluation's and the submission's options, submit."""
    from dinov2.eval.knn import get_args_parser

    submit.main(Evaluator, [get_args_parser(add_help=False)], name="dinov2:knn")


if __name__ == "__main__":
    cli.run(main)
