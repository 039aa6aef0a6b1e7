"""Submission of a job through submitit: to Slurm, or to this machine for a trial.

A job is a :class:`Task`: which module's ``main`` to call, and the parsed arguments. It holds no other logic.
When Slurm is about to stop a job, submitit asks the task for a fresh copy of itself and queues that; the
copy continues from the last run state on disk.
"""

import argparse
import copy
import importlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from dinov2.errors import ConfigError, OutputError
from dinov2.utils.cluster import get_slurm_executor_parameters, get_user_checkpoint_path

logger = logging.getLogger("dinov2")

CLUSTERS = ("slurm", "local", "debug")
# submitit's placeholder for the number that the job will get.
JOB_ID = "%j"
MAX_TIMEOUTS = 30
# The requeue needs this long; there is no saving at the signal.
SIGNAL_DELAY_SECONDS = 120


def get_args_parser(
    description: str | None = None,
    parents: Sequence[argparse.ArgumentParser] | None = None,
    add_help: bool = True,
) -> argparse.ArgumentParser:
    """Return the options of a submission, together with those of the ``parents`` (the task's own parser)."""
    parser = argparse.ArgumentParser(
        description=description,
        # A parser that brings its own --help would collide with this one's.
        parents=list(parents or ()),
        add_help=add_help,
    )
    parser.add_argument(
        "--ngpus",
        "--gpus",
        "--gpus-per-node",
        default=8,
        type=int,
        help="GPUs per node, one process each; 0 runs one process on the CPU",
    )
    parser.add_argument("--nodes", "--nnodes", default=1, type=int, help="number of machines")
    parser.add_argument("--timeout", default=2800, type=int, help="minutes until the job is requeued")
    parser.add_argument("--partition", default=None, type=str, help="Slurm partition (default: the site's)")
    parser.add_argument(
        "--use-volta32", action="store_true", help='ask for nodes with the feature "volta32gb"'
    )
    parser.add_argument("--comment", default="", type=str, help="comment shown in the queue")
    parser.add_argument("--exclude", default="", type=str, help="nodes to avoid, comma-separated")
    parser.add_argument(
        "--cluster",
        choices=CLUSTERS,
        default=None,
        help="where to run: slurm, local (processes on this machine) or debug (inside this process); "
        "default: slurm where there is one, else local",
    )
    parser.add_argument("--dry-run", action="store_true", help="check and show the request, submit nothing")
    return parser


def get_shared_folder() -> Path:
    """Return the folder for the outputs of jobs that were given none.

    Raises:
        ConfigError: The site has not named a shared folder.
    """
    path = get_user_checkpoint_path()
    if path is None:
        raise ConfigError(
            "no output folder was given and this cluster has no shared one: use --output-dir, or set "
            "DINOV2_CHECKPOINT_PATH"
        )
    return path / "experiments"


class Task:
    """A job: calls ``main(args)`` of the module named in ``module``.

    Args:
        args: Parsed arguments with ``output_dir``, in which ``%j`` stands for the job's number.
    """

    module: ClassVar[str]

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args

    def check(self) -> None:
        """Raise before submitting what would fail in the job."""

    def __call__(self) -> Any:
        """Run in the job; the module is imported only here."""
        import submitit

        from dinov2.logging import setup_logging

        setup_logging(level=logging.INFO)  # into submitit's file, until `main` sets up the run's own
        logging.getLogger("submitit").propagate = False  # it writes there by itself
        job = submitit.JobEnvironment()
        args = copy.deepcopy(self.args)
        args.output_dir = args.output_dir.replace(JOB_ID, str(job.job_id))
        if job.num_tasks > 1:
            # Not every executor starts its processes through srun, so say it in torchrun's words.
            submitit.helpers.TorchDistributedEnvironment().export(
                set_cuda_visible_devices=False, overwrite=True
            )
        logger.info(
            "process %d of %d of job %s, output in %s",
            job.global_rank,
            job.num_tasks,
            job.job_id,
            args.output_dir,
        )
        return importlib.import_module(self.module).main(args)

    def checkpoint(self) -> Any:
        """Called by submitit before the job is stopped: what to queue in its place."""
        import submitit

        logger.info("the job is about to be stopped, queueing it again")
        return submitit.helpers.DelayedSubmission(type(self)(self.args))


def submit_jobs(task_class: Callable[[argparse.Namespace], Task], args: argparse.Namespace, name: str) -> Any:
    """Submit ``task_class(args)`` under ``name``.

    Args:
        args: From a parser with :func:`get_args_parser` among its parents; not changed.

    Returns:
        submitit's job, or None for a dry run.

    Raises:
        ConfigError: The config file does not exist or the request cannot be met.
        OutputError: The output folder cannot be made.
    """
    args = _independent_copy(args)
    task = task_class(args)
    task.check()
    parameters = _executor_parameters(args, name)
    if args.dry_run:
        logger.info("would submit %s to %s: %s", name, args.cluster or "the cluster found", parameters)
        return None
    _make_folder(Path(args.output_dir.split(JOB_ID)[0]))
    import submitit

    executor = submitit.AutoExecutor(
        folder=args.output_dir, cluster=args.cluster, slurm_max_num_timeout=MAX_TIMEOUTS
    )
    if executor.cluster == "local" and args.nodes > 1:
        raise ConfigError(f"--nodes is {args.nodes}, but this machine is only one: use --nodes 1")
    executor.update_parameters(**parameters)
    job = executor.submit(task)
    logger.info(
        "submitted job %s, logs and results in %s", job.job_id, args.output_dir.replace(JOB_ID, job.job_id)
    )
    return job


def _independent_copy(args: argparse.Namespace) -> argparse.Namespace:
    """Return a copy with an output folder and without dependence on the current directory."""
    args = copy.deepcopy(args)
    if args.config_file:
        if not Path(args.config_file).is_file():
            raise ConfigError(f"the config file {args.config_file} does not exist: check --config-file")
        args.config_file = str(Path(args.config_file).resolve())
    args.output_dir = str(Path(args.output_dir or get_shared_folder() / JOB_ID).absolute())
    return args


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"the output folder {path} cannot be made ({error.strerror}): choose another --output-dir"
        ) from error


def _executor_parameters(args: argparse.Namespace, name: str) -> dict[str, Any]:
    options = {
        "slurm_partition": args.partition,
        "slurm_comment": args.comment,
        "slurm_exclude": args.exclude,
        "slurm_constraint": "volta32gb" if args.use_volta32 else "",
    }
    return get_slurm_executor_parameters(
        nodes=args.nodes,
        num_gpus_per_node=args.ngpus,
        name=name,
        timeout_min=args.timeout,
        slurm_signal_delay_s=SIGNAL_DELAY_SECONDS,
        # What was not asked for is left to the site's settings.
        **{key: value for key, value in options.items() if value},
    )


def main(task_class: type[Task], parents: Sequence[argparse.ArgumentParser], name: str) -> None:
    """The command line of an entry script: parse, submit."""
    from dinov2.logging import setup_logging

    args = get_args_parser(f"Submit a {name} job", parents).parse_args()
    setup_logging(level=logging.INFO)
    submit_jobs(task_class, args, name=name)
