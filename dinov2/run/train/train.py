"""Submit a training: ``python dinov2/run/train/train.py --nodes 4 --config-file ... key=value``."""

from dinov2 import cli
from dinov2.run import submit


class Trainer(submit.Task):
    """The job that trains."""

    module = "dinov2.train"

    def check(self) -> None:
        """Hold the config and the overrides against the schema, as the job would hours later."""
        from dinov2.configs import resolve_config

        resolve_config(
            self.args.config_file,
            list(self.args.opts),
            output_dir=self.args.output_dir,
            lenient=self.args.lenient_config,
        )


def main() -> None:
    """Parse the trainer's and the submission's options, submit."""
    from dinov2.train import get_args_parser

    submit.main(Trainer, [get_args_parser(add_help=False)], name="dinov2:train")


if __name__ == "__main__":
    cli.run(main)
